"""Does the student ever stand still for a pool that has enough capacity?

A real student (DeepSpeed, the real training loop, the real scheduler actor) has core 0 to itself; a real pool of one
replica, Ray, Serve and everything else share the other cores. In turns it trains a few steps with the pool and a few
with a teacher that answers at once from recorded payloads. Ratio of the medians of their step times; target: at most
1.05, and at most 3 % of a step waiting for the teacher.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
import torch
from rich.table import Table

from benchmarks.common import StepLines, median, write
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.data.cursor import BlockCursor
from taid_ray.scheduler.client import SchedulerClient
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.student.deepspeed_internals import use_deepspeed_on
from taid_ray.student.prefetch import Prefetcher, StepBatches
from taid_ray.teacher.payload import TeacherOutput
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lifecycle import start_pool, stop_pool
from taid_ray.teacher.protocol import TeacherInfo

VOCABULARY, LENGTH, ROWS, ACCUMULATION = 32_000, 128, 4, 2
ROUNDS, STEPS, BATCHES = 7, 3, 4
STUDENT_CORE = 0
POOL = "bench-overlap"


class RecordedTeacher:
    """A TeacherClient that knows every answer already."""

    def __init__(self, outputs: dict[int, TeacherOutput], info: TeacherInfo):
        self._outputs, self._info, self.tokens = outputs, info, 0

    def submit(self, batch: Batch) -> int:
        return _key(batch)

    def collect(self, request: int) -> TeacherOutput:
        return self._outputs[request]

    def info(self) -> TeacherInfo:
        return self._info


class StudentProcess:
    """Runs as an actor: one student worker without Ray Train around it."""

    def __init__(self, config: DistillConfig, scheduler: Any):
        os.sched_setaffinity(0, {STUDENT_CORE})
        torch.set_num_threads(1)
        use_deepspeed_on("cpu")
        from taid_ray.distributed.world import World
        from taid_ray.models.student_init import build_student
        from taid_ray.student.engine import Student

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
        torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
        self.config, device = config, torch.device("cpu")
        self.student = Student(config, build_student(config, None), VOCABULARY, World(), device)
        self.scheduler = SchedulerClient(scheduler, 0, 600)
        self.scheduler.begin(1, 1)
        self.last = self.scheduler.join(1, 1, None)
        self.pool = PoolTeacher(POOL, config.given_teacher, print)
        self.student.teacher_head = self.pool.head()
        self.steps = [_step(number) for number in range(BATCHES)]
        batches = [batch for step in self.steps for batch in step.batches]
        outputs = {_key(batch): self.pool.collect(self.pool.submit(batch)) for batch in batches}
        self.teachers: dict[str, Any] = {
            "pool": self.pool,
            "instant": RecordedTeacher(outputs, self.pool.info()),
        }

    def train(self, kind: str, steps: int) -> list[dict[str, Any]]:
        """Metrics of the next `steps` steps, without the first: nothing could be asked before it."""
        from taid_ray.student.loop import train_loop

        lines = StepLines()
        endless: Iterator[StepBatches] = (self.steps[n % BATCHES] for n in count())
        teacher, total = self.teachers[kind], self.last.step + steps + 1
        limited = islice(endless, steps + 1)
        stream = Prefetcher(limited, teacher, self.config.given_teacher.window, 2**30, self.student.clock)
        self.last = train_loop(self.student, self.scheduler, stream, lines, self.last, total)
        return [asdict(line) for line in lines.metrics[1:]]


def _key(batch: Batch) -> int:
    return int(batch.inputs["input_ids"].sum())


def _step(number: int) -> StepBatches:
    """Random rows; every position but the last carries loss."""
    generator = torch.Generator().manual_seed(number)
    rows = []
    for _ in range(ROWS):
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator).numpy()
        rows.append(Row(ids, np.arange(LENGTH), np.append(ids[1:], NO_LABEL)))
    size = ROWS // ACCUMULATION
    batches = [collate(rows[start : start + size]) for start in range(0, ROWS, size)]
    return StepBatches(batches, ROWS * (LENGTH - 1), BlockCursor())


def build(directory: Path) -> DistillConfig:
    """Random weights: this is about time only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def save(name: str, layers: int, width: int) -> str:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=LENGTH,
        )
        LlamaForCausalLM(config).save_pretrained(directory / name)
        return str(directory / name)

    return build_config(
        {
            "teacher": {"model": save("teacher", 8, 512), "dtype": "float32"},
            "student": {"model": save("student", 4, 256), "dtype": "float32"},
            "data": {"train": "unused"},
            "train": {"steps": 2 * ROUNDS * (STEPS + 1), "learning_rate": 1e-4},
        }
    )


def keep_off_the_student_core() -> None:
    """Moves every thread of this process tree, Ray and the replica included, to the other cores."""
    others = os.sched_getaffinity(0) - {STUDENT_CORE}
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        try:
            command = (task / "cmdline").read_bytes()
            if b"ray" in command and b"StudentProcess" not in command and task.stat().st_uid == os.getuid():
                os.sched_setaffinity(int(task.name), others)
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue


def main() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("this benchmark needs two cores: one for the student, one for the teacher")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    context = ray.init(address="local", num_cpus=4, logging_level="ERROR", log_to_driver=False)
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    lines: dict[str, list[dict[str, Any]]] = {"pool": [], "instant": []}
    with TemporaryDirectory() as directory:
        config = build(Path(directory))
        scheduler = SchedulerOwner("bench-overlap", config.schedule, config.train.steps or 0, 1)
        start_pool(PoolSpec(config.given_teacher, VOCABULARY, "cpu", use_role_resources=False), POOL)
        try:
            student = ray.remote(StudentProcess).options(num_cpus=1).remote(config, scheduler.actor)
            ray.get(student.train.remote("pool", 2))
            keep_off_the_student_core()
            for turn in range(ROUNDS):
                for kind, found in lines.items():
                    found += ray.get(student.train.remote(kind, STEPS))
                seconds = {kind: f"{found[-1]['step_s']:.2f} s" for kind, found in lines.items()}
                print(f"turn {turn + 1} of {ROUNDS}: last steps {seconds}", flush=True)
        finally:
            stop_pool(POOL)
            scheduler.close()
            ray.shutdown()
    report(lines)


def report(lines: dict[str, list[dict[str, Any]]]) -> None:
    steps = {kind: median([line["step_s"] for line in found]) for kind, found in lines.items()}
    wait = median([line["teacher_wait_s"] / line["step_s"] for line in lines["pool"]])
    busy = median([line["teacher_compute_s"] / line["step_s"] for line in lines["pool"]])
    ratio = steps["pool"] / steps["instant"]
    phases = ("data", "teacher_wait", "forward", "loss", "backward", "optimizer", "schedule_wait")
    table = Table(
        title="Overlap: a step with a real pool against one with a teacher that answers at once",
        caption=f"Student Llama 4 x 256 alone on one core, teacher Llama 8 x 512 on the other, {ROWS * LENGTH} tokens in "
        f"{ACCUMULATION} micro-batches, vocabulary {VOCABULARY:,}, float32; medians of {len(lines['pool'])} steps in "
        f"{ROUNDS} turns. The replica computes {busy:.0%} of the time.",
    )
    for column in ("teacher", "step, ms", *(f"{phase.replace('_', ' ')}" for phase in phases)):
        table.add_column(column, justify="right")
    shares = {}
    for kind, found in lines.items():
        parts = {phase: median([line[f"{phase}_s"] for line in found]) for phase in phases}
        shares[kind] = {phase: seconds / steps[kind] for phase, seconds in parts.items()}
        table.add_row(kind, f"{1000 * steps[kind]:.0f}", *(f"{1000 * seconds:.1f}" for seconds in parts.values()))
    verdict = Table("figure", "measured", "target")
    verdict.add_row("step with pool / step with instant teacher", f"{ratio:.3f}", "<= 1.05")
    verdict.add_row("teacher_wait_s / step_s", f"{wait:.2%}", "<= 3 %")
    result = {"ratio": ratio, "teacher_wait_share": wait, "teacher_busy": busy, "step_s": steps, "phase_shares": shares}
    write("overlap", result, [table, verdict])


if __name__ == "__main__":
    # By its real name, so that the actor's class is imported by its process instead of being pickled with this module.
    from benchmarks import overlap

    overlap.main()
