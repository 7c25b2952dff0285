"""What a comparison computes on the cluster beside its runs: evaluations of students, and memory of methods. Ray tasks."""

import gc
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from taid_ray.compare.evaluation import Evaluator
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import collate
from taid_ray.data.dataset import validation_rows
from taid_ray.distributed.device import collective_backend, torch_device
from taid_ray.distributed.world import World
from taid_ray.driver.progress import ProgressView
from taid_ray.errors import RunError, TaidRayError, shortened
from taid_ray.models.pair import model_configs, run_tokenizer, shared_vocabulary
from taid_ray.models.student_init import build_student
from taid_ray.student.deepspeed_internals import use_deepspeed_on
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.payload import TeacherOutput, needs_head

MEMORY_STEPS = 20
"""Optimizer steps of the run that tells a method's memory."""
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment of the process whose memory is measured: glibc then gives back at once what is freed, and two measurements of
the same method differ by a per cent instead of ten."""
TASK_RETRIES = 2
POLL_S = 1.0


def evaluate(settings: str, device: str, run: str) -> dict[str, Any]:
    """Evaluates the student of a run directory, see `Evaluator`. settings: configuration of the comparison as JSON.

    device: cpu or cuda. A process loads the teacher once, for all runs that it is given.
    """
    return _evaluator(settings, device).evaluate(Path(run) / "model").as_json()


@lru_cache(maxsize=1)
def _evaluator(settings: str, device: str) -> Evaluator:
    return Evaluator(DistillConfig.model_validate_json(settings), torch_device(device))


def peak_memory(settings: str, device: str) -> int:
    """Measures what MEMORY_STEPS steps of one micro-batch need, in bytes: weights, optimizer, gradients, activations and loss.

    settings: configuration of a run as JSON. The process must be one of its own. It is the whole student worker, so ZeRO divides
    nothing. On a CPU it is the growth of the resident size, to its peak during the steps; on a GPU what torch has allocated.
    The micro-batch is of the longest held-out rows. The teacher answers it once, and is gone before the student is built.
    """
    config, where = DistillConfig.model_validate_json(settings), torch_device(device)
    use_deepspeed_on(device)
    from taid_ray.student.engine import Student  # loads DeepSpeed, for the device that was chosen

    vocabulary = shared_vocabulary(config, *model_configs(config))
    rows = validation_rows(config.data.validations[0], run_tokenizer(config))
    rows.sort(key=lambda row: -row.num_loss_tokens)
    size = config.train.micro_batch_size
    batch = collate((rows * size)[:size] if len(rows) < size else rows[:size])
    section = config.given_teacher.model_copy(update={"shards": 1})
    teacher = TeacherModel(section, vocabulary.num_shared, where)
    answer: TeacherOutput | None = None
    if config.learns_from_teacher:
        answer = TeacherOutput(section.payload, teacher.score(batch.inputs, batch.loss_positions, batch.labels))
    head = teacher.head().to(where) if needs_head(section.payload) else None
    del teacher
    gc.collect()
    _join_alone(device)
    memory = Memory(where)
    student = Student(config, build_student(config, vocabulary).eval(), vocabulary.num_shared, World(), where)
    student.teacher_head = head
    memory.forget_peak()
    for step in range(MEMORY_STEPS):
        student.reseed(step)
        loss, _ = student.forward(batch, answer, config.effective_schedule.t_start)
        student.backward(loss / batch.num_loss_tokens)
        student.step(config.train.learning_rate)
    return memory.growth()


def _join_alone(device: str) -> None:
    """Makes a process group of this process, which DeepSpeed needs."""
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group(
        collective_backend(device), store=torch.distributed.HashStore(), rank=0, world_size=1
    )


class Memory:
    """Memory of this process from now on: of its GPU, or on a CPU its resident size (Linux)."""

    def __init__(self, device: torch.device):
        self._device = device
        self._before = torch.cuda.memory_allocated() if device.type == "cuda" else _resident("VmRSS")

    def forget_peak(self) -> None:
        """Forgets what was needed so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS

    def growth(self) -> int:
        """Bytes at the peak, less those at the beginning."""
        peak = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else _resident("VmHWM")
        return max(0, peak - self._before)


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def results(tasks: Mapping[ray.ObjectRef, str], what: str, view: ProgressView) -> Iterator[tuple[str, Any]]:
    """Yields name and result of each task that ends, in the order in which they do, and shows how many are left.

    tasks: names by reference; `what` stands before a name in messages. What a task raises that a user can put right is raised
    here, anything else as RunError. The tasks that have not ended by then are cancelled.
    """
    left = dict(tasks)
    try:
        while left:
            view.wait_for(f"{what}: {len(left)} to go")
            ready, _ = ray.wait([*left], timeout=POLL_S)
            for reference in ready:
                name = left.pop(reference)
                yield name, _result(reference, f"{what} {name}")
    finally:
        for reference in left:
            ray.cancel(reference)


def _result(reference: ray.ObjectRef, name: str) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, TaidRayError):
            raise error.cause from None
        raise RunError(f"{name} failed: {shortened(error.cause)}") from error
    except RayError as error:
        raise RunError(f"{name} failed: {shortened(error)}; it was tried {TASK_RETRIES + 1} times") from error
