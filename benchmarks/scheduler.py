"""The TAID scheduler actor: how long every worker waits for t, and what of that is left beside a backward pass.

The actor is the real one, started as a run starts it. The ranks are coroutines that speak its protocol, in at most 4
processes of this machine. Behind the backward pass, rank 0 is a real SchedulerClient and the backward pass a timed wait.
"""

import asyncio
import os
import pickle
import time
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from rich.table import Table

from benchmarks.common import local_ray, median, write
from taid_ray.config.objective import ScheduleConfig
from taid_ray.scheduler.actor import Report
from taid_ray.scheduler.aggregate import HEARTBEAT_S, LossSums, StepResult
from taid_ray.scheduler.client import SchedulerClient
from taid_ray.scheduler.owner import SchedulerOwner

STEPS = {2: 1000, 8: 1000, 32: 400, 128: 200, 512: 50}
"""Measured steps for each number of ranks."""
WARM_UP_STEPS = 20
PROCESSES = min(4, len(os.sched_getaffinity(0)))
"""Of the ranks. More than cores would measure how the system shares these; on a cluster a rank has a core of its own."""
PERCENTILES = {"median": 50, "p90": 90, "p99": 99, "max": 100}
TARGET_RANKS, TARGET_P99_MS = 8, 10.0

BACKWARD_S = {1: 0.05, 8: 0.05, 32: 0.05, 128: 0.2}
"""Simulated backward pass for each number of ranks. For 128 ranks longer, because the cores here have to play them all."""
BLOCK_STEPS, BLOCKS = 10, 10
SUMS = LossSums(kl=1234.5, entropy=2345.6, sft=0.0, tokens=2048, teacher_wait_s=0.001, payload_bytes=10 * 2**20)


class Ranks:
    """Some ranks in one process, each a coroutine. They send what SchedulerClient sends, heartbeats included."""

    def __init__(self, actor: ActorHandle, ranks: list[int], world_size: int):
        self._actor, self._ranks, self._world_size = actor, ranks, world_size

    async def run(self, attempt: int, start: StepResult, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """[steps] each, in ns of the machine's monotonic clock: the last report sent, the last answer received."""
        times = np.zeros((2, len(self._ranks), steps), np.int64)
        known = [start] * len(self._ranks)

        async def train(index: int, rank: int) -> None:
            for step in range(1, steps + 1):
                times[0, index, step - 1] = time.monotonic_ns()
                report = Report(attempt, self._world_size, known[index], step, rank, SUMS)
                known[index] = pickle.loads(await self._actor.report.remote(pickle.dumps(report)))
                times[1, index, step - 1] = time.monotonic_ns()

        async def beat(index: int) -> None:
            while True:
                await asyncio.sleep(HEARTBEAT_S)
                await self._actor.heartbeat.remote(attempt, self._world_size, known[index])

        beats = [asyncio.create_task(beat(index)) for index in range(len(self._ranks))]
        await asyncio.gather(*[train(index, rank) for index, rank in enumerate(self._ranks)])
        for task in beats:
            task.cancel()
        return times[0].max(0), times[1].max(0)


def main() -> None:
    with local_ray(num_cpus=4, object_store_mib=128):
        trips = [round_trip(ranks, steps) for ranks, steps in STEPS.items()]
        hidden = [hidden_behind_backward(ranks, backward_s) for ranks, backward_s in BACKWARD_S.items()]
    (chosen,) = [trip for trip in trips if trip["ranks"] == TARGET_RANKS]
    target = {"ranks": TARGET_RANKS, "p99_ms": TARGET_P99_MS, "met": chosen["p99_ms"] <= TARGET_P99_MS}
    write(
        "scheduler",
        {"target": target, "round_trip": trips, "hidden": hidden},
        [round_trip_table(trips, target), hidden_table(hidden)],
    )


def round_trip(ranks: int, steps: int) -> dict[str, Any]:
    """Per step, from the moment the last rank sends its report until every rank holds the new t."""
    owner = start_scheduler(WARM_UP_STEPS + steps, ranks)
    try:
        processes = start_ranks(owner.actor, range(ranks), ranks)
        attempt = ray.get(owner.actor.begin.remote(ranks))
        start = ray.get(owner.actor.current.remote(attempt, ranks))
        times = np.array(ray.get([each.run.remote(attempt, start, WARM_UP_STEPS + steps) for each in processes]))
    finally:
        owner.close()
    sent, received = times.max(0)[:, WARM_UP_STEPS:]
    milliseconds = (received - sent) / 1e6
    quantiles = {f"{name}_ms": float(np.percentile(milliseconds, q)) for name, q in PERCENTILES.items()}
    return {"ranks": ranks, "processes": len(processes), "steps": steps, **quantiles}


def hidden_behind_backward(ranks: int, backward_s: float) -> dict[str, Any]:
    """Rank 0's steps of submit, backward pass, collect, in blocks that alternate with blocks of the backward pass alone.

    The other ranks have reported before, as soon as they had the last answer.
    """
    total = BLOCK_STEPS * BLOCKS
    owner = start_scheduler(total)
    client = SchedulerClient(owner.actor, 0, 600)
    try:
        others = start_ranks(owner.actor, range(1, ranks), ranks)
        attempt = 1
        client.begin(attempt, ranks)
        start = client.join(attempt, ranks, None)
        running = [each.run.remote(attempt, start, total) for each in others]
        blocks = []
        for first in range(1, total, BLOCK_STEPS):
            steps = range(first, first + BLOCK_STEPS)
            alone, together = ([timed_step(each, step, backward_s) for step in steps] for each in (None, client))
            blocks.append(1e3 * (np.median(together, 0) - np.median(alone, 0)))
        ray.get(running)
    finally:
        client.close()
        owner.close()
    added, submit, collect = np.transpose(blocks)
    return {
        "ranks": ranks,
        "backward_ms": backward_s * 1e3,
        "added_ms": median(added),
        "added_ms_of_blocks": sorted(added.tolist()),
        "submit_ms": median(submit),
        "collect_ms": median(collect),
    }


def timed_step(client: SchedulerClient | None, step: int, backward_s: float) -> tuple[float, float, float]:
    """Seconds of the whole step, of submit, and of collect."""
    start = time.perf_counter()
    if client is not None:
        client.submit(step, SUMS)
    sent = time.perf_counter()
    time.sleep(backward_s)
    computed = time.perf_counter()
    if client is not None:
        client.collect(step)
    end = time.perf_counter()
    return end - start, sent - start, end - computed


def start_scheduler(total_steps: int, workers: int = 1) -> SchedulerOwner:
    return SchedulerOwner(f"benchmark-{time.time_ns()}", ScheduleConfig(), total_steps, workers)


def start_ranks(actor: ActorHandle, ranks: range, world_size: int) -> list[Any]:
    """The ranks dealt out to at most PROCESSES processes, which are up when this returns."""
    shares = [list(ranks[k::PROCESSES]) for k in range(min(PROCESSES, len(ranks)))]
    actor_class = ray.remote(num_cpus=0)(Ranks)
    processes = [actor_class.remote(actor, share, world_size) for share in shares]
    ray.get([process.__ray_ready__.remote() for process in processes])
    return processes


def round_trip_table(trips: list[dict[str, Any]], target: dict[str, Any]) -> Table:
    table = Table(
        title="TAID scheduler: last report sent -> every rank holds t, in ms",
        caption=f"Real actor and protocol; ranks are coroutines in `processes` processes of one machine. Target: p99 <= "
        f"{target['p99_ms']:g} ms at {target['ranks']} ranks, {'met' if target['met'] else 'MISSED'}.",
    )
    for column in ("ranks", "processes", "steps", *PERCENTILES):
        table.add_column(column, justify="right")
    for trip in trips:
        times = [f"{trip[f'{name}_ms']:.2f}" for name in PERCENTILES]
        table.add_row(*[str(trip[key]) for key in ("ranks", "processes", "steps")], *times)
    return table


def hidden_table(hidden: list[dict[str, Any]]) -> Table:
    table = Table(
        title="The same behind the backward pass, in ms",
        caption="Rank 0 is a real SchedulerClient, the backward pass a timed wait. Added: step with submit and collect minus "
        f"step without, median of {BLOCKS} pairs of blocks of {BLOCK_STEPS} steps (lowest to highest pair).",
    )
    for column in ("ranks", "backward pass", "added to the step", "of which submit", "of which collect"):
        table.add_column(column, justify="right")
    for row in hidden:
        low, *_, high = row["added_ms_of_blocks"]
        added = f"{row['added_ms']:.2f} ({low:.2f} to {high:.2f})"
        own = [f"{row[key]:.2f}" for key in ("submit_ms", "collect_ms")]
        table.add_row(str(row["ranks"]), f"{row['backward_ms']:g}", added, *own)
    return table


if __name__ == "__main__":
    main()
