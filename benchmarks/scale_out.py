"""Weak scaling of everything but the models: 1 to 32 student workers and their share of teacher replicas.

Real: the training loop, prefetching, the pool's clients, Serve, the replicas' queues, the payloads through the object
store, the number of replicas changed on the live pool, the scheduler actor and its clients. Timed waits: the student's
forward and backward passes and the teacher's computation. Left out: the all-reduce of gradients. The workers are threads
of a few processes, because 32 processes with torch would measure this machine's memory instead.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from rich.table import Table
from torch import Tensor

from benchmarks.common import StepLines, local_ray, median, write
from taid_ray.config.models import TeacherConfig
from taid_ray.config.objective import ScheduleConfig
from taid_ray.config.training import TrainConfig
from taid_ray.data.batch import Batch, Row
from taid_ray.data.cursor import BlockCursor, Cursor
from taid_ray.distributed.world import World
from taid_ray.losses.chunked import LossParts
from taid_ray.losses.projection import LogitTransform
from taid_ray.run.metrics import StepMetrics
from taid_ray.scheduler.aggregate import StepResult
from taid_ray.scheduler.client import SchedulerClient
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.student.clock import PhaseClock
from taid_ray.student.deepspeed_internals import use_deepspeed_on
from taid_ray.teacher.pool import deployment
from taid_ray.teacher.pool.client import PoolTeacher, replica_states
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lease import find_lease
from taid_ray.teacher.pool.lifecycle import start_pool, stop_pool
from taid_ray.teacher.pool.replica import TeacherReplica
from taid_ray.teacher.protocol import TeacherInfo

WORKERS_AND_REPLICAS = ((32, 8), (16, 4), (8, 2), (4, 1), (2, 1), (1, 1))
"""Replicas to spare: at most 4 workers ask each of them, for 4 * TEACHER_S = 0.8 s of work in a step of 1 s."""
FORWARD_S, BACKWARD_S, TEACHER_S = 0.3, 0.7, 0.2
WARM_UP_STEPS, STEPS = 3, 12
TOTAL_STEPS = WARM_UP_STEPS + STEPS
PROCESSES = 4
TOKENS, HIDDEN = 256, 2048
"""Loss positions of a worker's step and the teacher's width: an answer of 1 MiB in bfloat16."""
TARGET_EFFICIENCY = 0.95


class TimedModel:
    """Stands for a TeacherModel: waits as long as one would compute, and answers with the same hidden states."""

    def __init__(self) -> None:
        self._hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()

    def info(self) -> TeacherInfo:
        return TeacherInfo(
            fingerprint="simulated",
            probe_digest="simulated",
            head_digest="simulated",
            dtype="bfloat16",
            hidden_size=HIDDEN,
            num_parameters=0,
            vocab_rows=HIDDEN,
            num_shared=HIDDEN,
            payload="hidden",
            topk=1,
            bytes_per_token=2 * HIDDEN,
            transform=LogitTransform(),
            has_bias=False,
            dropped_mass=0.0,
            packing_error=None,
        )

    def check_request(self, inputs: dict[str, Tensor], loss_positions: Tensor, labels: Tensor) -> None:
        pass

    def score(self, inputs: dict[str, Tensor], loss_positions: Tensor, labels: Tensor) -> dict[str, Tensor]:
        time.sleep(TEACHER_S)
        return {"hidden": self._hidden[: len(loss_positions)]}


class TimedReplica(TeacherReplica):
    """The pool's replica, queue and all, around a TimedModel."""

    async def _load(self, config: TeacherConfig, num_shared: int, device_kind: str) -> Any:
        return TimedModel()


class TimedStudent:
    """Stands for a Student: waits as long as one would compute."""

    device = torch.device("cpu")
    source_names = ("",)

    def __init__(self) -> None:
        self.clock = PhaseClock(self.device)
        self.config = SimpleNamespace(train=TrainConfig(steps=TOTAL_STEPS))

    def forward(self, batch: Batch, *_: Any) -> tuple[Tensor, LossParts]:
        time.sleep(FORWARD_S)
        tokens = torch.tensor(float(batch.num_loss_tokens), dtype=torch.float64)
        return tokens, LossParts(tokens, tokens, 0 * tokens, tokens, torch.zeros(3, 0))

    def backward(self, loss: Tensor) -> None:
        time.sleep(BACKWARD_S)

    temperature = 1.0

    def begin_step(self, step: int, total_steps: int) -> None:
        pass

    def step(self, learning_rate: float) -> float:
        return 1.0


class WorkerProcess:
    """Some of the student workers, each of them a thread."""

    def __init__(self) -> None:
        use_deepspeed_on("cpu")  # the training loop imports it
        import taid_ray.student.loop  # noqa: F401  # now, not in the first measured step

    def run(
        self, ranks: list[int], world_size: int, scheduler: ActorHandle, attempt: int, start: StepResult, pool: str
    ) -> list[list[tuple[float, StepMetrics]]]:
        """For each rank and step when it was done, in s of the monotonic clock, and its metrics."""
        with ThreadPoolExecutor(len(ranks)) as threads:
            running = [threads.submit(train, r, world_size, scheduler, attempt, start, pool) for r in ranks]
            return [each.result() for each in running]


def train(
    rank: int, world_size: int, actor: ActorHandle, attempt: int, start: StepResult, pool: str
) -> list[tuple[float, StepMetrics]]:
    """What worker.run_worker does between building its parts and saving the model."""
    from taid_ray.student.loop import train_loop
    from taid_ray.student.prefetch import READ_AHEAD_STEPS, Prefetcher, read_ahead, step_batches

    teacher_config = TeacherConfig(model="simulated")
    scheduler, student = SchedulerClient(actor, rank, 600), TimedStudent()
    last = scheduler.join(attempt, world_size, start)
    client = PoolTeacher(pool, teacher_config)
    steps = step_batches(read_ahead(global_batches(world_size), READ_AHEAD_STEPS), World(rank, world_size), 1)
    stream = Prefetcher(steps, client, teacher_config.window, teacher_config.window_mib * 2**20, student.clock)
    lines = StepLines()
    train_loop(cast(Any, student), scheduler, stream, lines, last, TOTAL_STEPS)
    client.close()
    scheduler.close()
    return [*zip(lines.done_at, lines.metrics, strict=True)]


def global_batches(world_size: int) -> Iterator[tuple[list[Row], Cursor]]:
    """A row for each worker; every position carries loss."""
    row = Row(np.arange(TOKENS), np.arange(TOKENS), np.arange(TOKENS))
    return repeat(([row] * world_size, BlockCursor()), TOTAL_STEPS)


def main() -> None:
    pool = "benchmark"
    with local_ray(num_cpus=16, object_store_mib=1024):
        processes = [ray.remote(num_cpus=0)(WorkerProcess).remote() for _ in range(PROCESSES)]
        with patch.object(deployment, "TeacherReplica", TimedReplica):
            config = TeacherConfig(model="simulated", replicas=WORKERS_AND_REPLICAS[0][1])
            start_pool(PoolSpec(config, HIDDEN, "cpu", use_role_resources=True), pool)
        try:
            points = [measure(pool, processes, workers, replicas) for workers, replicas in WORKERS_AND_REPLICAS]
        finally:
            stop_pool(pool)
    points.sort(key=lambda point: point["workers"])
    for point in points:
        point["efficiency"] = points[0]["step_s"] / point["step_s"]
    worst = min(point["efficiency"] for point in points)
    target = {"efficiency": TARGET_EFFICIENCY, "lowest": worst, "met": worst >= TARGET_EFFICIENCY}
    write("scale_out", {"target": target, "points": points}, [table_of(points, target)])


def measure(pool: str, processes: list[ActorHandle], workers: int, replicas: int) -> dict[str, Any]:
    """One run of `workers` workers: times of a step until all workers are done with it."""
    scale(pool, replicas)
    owner = SchedulerOwner(f"benchmark-{time.time_ns()}", ScheduleConfig(), TOTAL_STEPS, workers)
    try:
        attempt = 1
        ray.get(owner.actor.begin.remote(attempt, workers))
        start = ray.get(owner.actor.current.remote(attempt, workers))
        shares = [list(range(workers))[k::PROCESSES] for k in range(min(PROCESSES, workers))]
        running = [
            process.run.remote(ranks, workers, owner.actor, attempt, start, pool)
            for process, ranks in zip(processes, shares, strict=False)
        ]
        ranks = [found for share in ray.get(running) for found in share]
    finally:
        owner.close()
    done = np.array([[at for at, _ in found] for found in ranks]).max(0)
    seconds = np.diff(done)[WARM_UP_STEPS - 1 :]
    metrics = [each for _, each in ranks[0][WARM_UP_STEPS:]]
    return {
        "workers": workers,
        "replicas": replicas,
        "step_s": median(seconds),
        "step_s_p90": float(np.percentile(seconds, 90)),
        "teacher_wait_s": median([each.teacher_wait_s for each in metrics]),
        "data_s": median([each.data_s for each in metrics]),
        "schedule_wait_s": median([each.schedule_wait_s for each in metrics]),
    }


def scale(pool: str, replicas: int) -> None:
    """What `taid-ray scale` does, and waits until exactly so many run."""
    lease = find_lease(pool)
    assert lease is not None
    ray.get(lease.set_replicas.remote(replicas))
    while replica_states(pool) != {"RUNNING": replicas}:
        time.sleep(0.5)


def table_of(points: list[dict[str, Any]], target: dict[str, Any]) -> Table:
    table = Table(
        title=f"Weak scaling of the control path, {FORWARD_S + BACKWARD_S:g} s of computation per step",
        caption="Real: training loop, prefetch, pool clients, Serve, replicas' queues, payloads of 1 MiB through the object "
        "store, scheduler actor and clients. Timed waits: forward, backward, the teacher's "
        f"{TEACHER_S:g} s per request. Left out: the gradients' all-reduce. Workers are threads of up to {PROCESSES} "
        f"processes on one machine. Target: efficiency >= {target['efficiency']:.0%}, "
        f"{'met' if target['met'] else 'MISSED'}.",
    )
    columns = (
        "workers",
        "replicas",
        "step, s",
        "p90, s",
        "efficiency",
        "teacher wait, ms",
        "data, ms",
        "schedule wait, ms",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for point in points:
        waits = [f"{1e3 * point[key]:.1f}" for key in ("teacher_wait_s", "data_s", "schedule_wait_s")]
        seconds = [f"{point[key]:.3f}" for key in ("step_s", "step_s_p90")]
        table.add_row(str(point["workers"]), str(point["replicas"]), *seconds, f"{point['efficiency']:.1%}", *waits)
    return table


if __name__ == "__main__":
    main()
