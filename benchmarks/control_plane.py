"""The control plane: messages and CPU time at a run's two central actors, the TAID scheduler and the teacher pool's lease.

Both actors are the real ones, started as a run starts them, in a subclass that counts calls. The student workers are threads
of a few processes: each a real SchedulerClient with its heartbeat thread, which does a step every STEP_S. Rank 0 and the driver
renew the lease; the driver polls; the replicas (one for every WORKERS_PER_REPLICA workers) report their load; Serve's
autoscaling policy asks for their number. What one message costs comes from sending each kind alone.
"""

import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import ray
from ray.actor import ActorHandle
from rich.table import Table

from benchmarks.common import local_ray, write
from taid_ray.config.models import TeacherConfig
from taid_ray.config.objective import ScheduleConfig
from taid_ray.driver.pool import RETELL_S
from taid_ray.driver.progress_relay import POLL_S
from taid_ray.scheduler import owner
from taid_ray.scheduler.aggregate import LossSums
from taid_ray.scheduler.client import SchedulerClient
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.teacher.pool import lease
from taid_ray.teacher.pool.autoscaling import REPORT_S, PoolPolicy
from taid_ray.teacher.pool.lease import NAMESPACE, create_lease, end_lease, keep_lease, lease_name

CLIENTS = (8, 32, 128, 512)
STEP_S, BACKWARD_S = 2.0, 1.3
"""A step, and how much of it lies between the report of its loss and the moment at which its result is wanted."""
STEPS = 30
PROCESSES = 2
"""Of the simulated workers."""
WORKERS_PER_REPLICA = 8
ALONE_S, ALONE_PER_S = 15.0, 100
"""Messages of one kind alone: for how long, and how many a second."""
TARGET_CLIENTS, TARGET = 512, 0.02
ATTEMPT = 1
SUMS = LossSums(kl=1234.5, entropy=2345.6, sft=0.0, tokens=2048, teacher_wait_s=0.001, payload_bytes=10 * 2**20)


def counting(actor_class: type) -> type:
    """A subclass of an actor's class that counts the calls which come from outside, by method.

    Its method `used` returns these counts and the CPU time (s) of the process so far, all threads together.
    """

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def count(self: Any) -> ContextVar[bool]:
            within: ContextVar[bool] = self.__dict__.setdefault("within", ContextVar("within", default=False))
            if not within.get():
                self.__dict__.setdefault("calls", Counter())[name] += 1
            within.set(True)
            return within

        async def call_async(self: Any, *given: Any) -> Any:
            count(self)  # each call of an async actor has a context of its own
            return await method(self, *given)

        def call(self: Any, *given: Any) -> Any:
            within = count(self)
            try:
                return method(self, *given)
            finally:
                within.set(False)

        return call_async if inspect.iscoroutinefunction(method) else call

    def used(self: Any) -> tuple[Counter[str], float]:
        return self.__dict__.setdefault("calls", Counter()), time.process_time()

    async def used_async(self: Any) -> tuple[Counter[str], float]:
        return used(self)

    methods = inspect.getmembers(actor_class, inspect.isfunction)
    public = {name: counted(name, method) for name, method in methods if not name.startswith("_")}
    is_async = any(inspect.iscoroutinefunction(method) for _, method in methods)
    return type(actor_class.__name__, (actor_class,), {**public, "used": used_async if is_async else used})


class Workers:
    """Some student workers, each a thread in this process."""

    def run(self, actor: ActorHandle, app_name: str, ranks: list[int], world_size: int) -> None:
        """Returns when all have done STEPS steps."""

        def work(rank: int) -> None:
            client = SchedulerClient(actor, rank, 600)
            stop_renewing = keep_lease(app_name) if rank == 0 else None
            client.join(ATTEMPT, world_size, None)
            for step in range(1, STEPS + 1):
                begun = time.monotonic()
                client.submit(step, SUMS)
                time.sleep(BACKWARD_S)
                client.collect(step)
                time.sleep(max(0.0, begun + STEP_S - time.monotonic()))
            client.close()
            if stop_renewing is not None:
                stop_renewing()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main() -> None:
    owner.SchedulerActor = counting(owner.SchedulerActor)  # type: ignore[misc, assignment]
    lease.Lease = counting(lease.Lease)  # type: ignore[misc, assignment]
    with local_ray(num_cpus=4, object_store_mib=128):
        costs = costs_alone()
        print(costs, flush=True)
        points = []
        for clients in CLIENTS:
            points.append(with_shares(measure(clients), costs))
            print(points[-1], flush=True)
    (chosen,) = [point for point in points if point["clients"] == TARGET_CLIENTS]
    target = {"clients": TARGET_CLIENTS, "share": TARGET, "met": chosen["scheduler"]["other_share"] <= TARGET}
    result = {"step_s": STEP_S, "steps": STEPS, "target": target, "ms_per_message_alone": costs, "points": points}
    write("control_plane", result, [costs_table(costs), scheduler_table(points, target), lease_table(points)])


class Actors:
    """A scheduler actor and a lease, started as a run starts them."""

    def __init__(self, clients: int):
        self.app_name = f"benchmark-{time.time_ns()}"
        self.owner = SchedulerOwner(self.app_name, ScheduleConfig(), 10**6, clients)
        config = TeacherConfig(model="none", idle_timeout_s=3600)
        self.handles = {"scheduler": self.owner.actor, "lease": create_lease(self.app_name, config, None)}
        self.used()  # they are up

    def used(self) -> dict[str, tuple[Counter[str], float]]:
        return {name: ray.get(handle.used.remote()) for name, handle in self.handles.items()}

    def close(self) -> None:
        self.owner.close()
        end_lease(self.app_name)


def costs_alone() -> dict[str, float]:
    """CPU time (ms) of an actor for one message of each kind, sent alone; under `idle`, ms per second without any."""
    actors = Actors(1)
    scheduler, pool_lease = actors.handles["scheduler"], actors.handles["lease"]
    client = SchedulerClient(scheduler, 0, 600)
    client.begin(ATTEMPT, 1)
    start, steps = client.join(ATTEMPT, 1, None), iter(range(1, 10**6))

    def report() -> None:
        """As every rank of a run; alone in its world, it is answered at once."""
        client.submit(step := next(steps), SUMS)
        client.collect(step)

    sends: dict[str, Callable[[], Any]] = {
        "scheduler.report": report,
        "scheduler.heartbeat": lambda: ray.get(scheduler.heartbeat.remote(ATTEMPT, 1, start)),
        "scheduler.news": lambda: ray.get(scheduler.news.remote(0)),
        "scheduler.set_pool": lambda: ray.get(scheduler.set_pool.remote(None)),
        "lease.renew": lambda: ray.get(pool_lease.renew.remote()),
        "lease.failure": lambda: ray.get(pool_lease.failure.remote()),
        "lease.replicas": lambda: ray.get(pool_lease.replicas.remote(1)),
        "lease.report_load": lambda: ray.get(pool_lease.report_load.remote("replica", 1.0)),
    }
    found, before = {}, actors.used()
    time.sleep(ALONE_S)
    for name, (_, spent_s) in actors.used().items():
        found[f"{name}.idle"] = 1e3 * (spent_s - before[name][1]) / ALONE_S
    for kind, send in sends.items():
        name, began_s = kind.partition(".")[0], time.monotonic()
        before = actors.used()
        messages = repeat(send)
        spent_ms = 1e3 * (actors.used()[name][1] - before[name][1])
        found[kind] = (spent_ms - found[f"{name}.idle"] * (time.monotonic() - began_s)) / messages
    client.close()
    actors.close()
    return found


def repeat(send: Callable[[], Any]) -> int:
    """Sends ALONE_PER_S messages a second for ALONE_S; returns how many."""
    start, count = time.monotonic(), 0
    while time.monotonic() - start < ALONE_S:
        send()
        count += 1
        time.sleep(max(0.0, start + count / ALONE_PER_S - time.monotonic()))
    return count


def measure(clients: int) -> dict[str, Any]:
    """Messages by kind, and CPU time, at both actors while so many workers do STEPS steps."""
    actors, done = Actors(clients), threading.Event()
    processes = [ray.remote(num_cpus=0)(Workers).remote() for _ in range(PROCESSES)]
    ray.get([process.__ray_ready__.remote() for process in processes])
    ray.get(actors.owner.actor.begin.remote(ATTEMPT, clients))
    threads = background(actors, max(1, clients // WORKERS_PER_REPLICA), done)
    stop_renewing = keep_lease(actors.app_name)
    begun, before = time.monotonic(), actors.used()
    shares = [list(range(clients)[k::PROCESSES]) for k in range(PROCESSES)]
    ray.get(
        [
            process.run.remote(actors.owner.actor, actors.app_name, share, clients)
            for process, share in zip(processes, shares, strict=True)
        ]
    )
    seconds, after = time.monotonic() - begun, actors.used()
    done.set()
    stop_renewing()
    for thread in threads:
        thread.join()
    for process in processes:
        ray.kill(process)
    actors.close()
    point: dict[str, Any] = {"clients": clients, "seconds": seconds}
    for name in after:
        calls, cpu_s = after[name][0] - before[name][0], after[name][1] - before[name][1]
        point[name] = {"messages": dict(calls), "cpu_s": cpu_s, "core_share": cpu_s / seconds}
    return point


def with_shares(point: dict[str, Any], costs: dict[str, float]) -> dict[str, Any]:
    """Adds what each kind of message took of an actor's CPU time, in s, and the share of all but the workers' reports.

    What one message costs falls with their number, because Ray handles several at a time; so the costs of messages sent
    alone only say how the time that was measured is divided.
    """
    for name in ("scheduler", "lease"):
        actor = point[name]
        busy_s = actor["cpu_s"] - 1e-3 * costs[f"{name}.idle"] * point["seconds"]
        weights = {
            kind: n * costs[f"{name}.{kind}"] for kind, n in actor["messages"].items() if f"{name}.{kind}" in costs
        }
        actor["cpu_s_by_kind"] = {kind: busy_s * weight / sum(weights.values()) for kind, weight in weights.items()}
        other_s = sum(spent_s for kind, spent_s in actor["cpu_s_by_kind"].items() if kind != "report")
        actor["other_share"], actor["other_core_share"] = other_s / actor["cpu_s"], other_s / point["seconds"]
    return point


def background(actors: Actors, replicas: int, done: threading.Event) -> list[threading.Thread]:
    """What the driver, the replicas and Serve's controller send beside the workers, until `done`."""
    pool_lease = actors.handles["lease"]

    def poll() -> None:
        while not done.wait(POLL_S):
            actors.owner.news(0)

    def retell() -> None:
        while not done.wait(RETELL_S):
            actors.owner.set_pool(None)
            ray.get(pool_lease.failure.remote())

    def report_load() -> None:
        while not done.wait(REPORT_S):
            ray.get([pool_lease.report_load.remote(f"replica-{k}", 1.0) for k in range(replicas)])

    policy = PoolPolicy(lease_name(actors.app_name), NAMESPACE)  # its thread ends with the lease
    policy._current = 1
    threads = [threading.Thread(target=work) for work in (poll, retell, report_load)]
    for thread in threads:
        thread.start()
    return threads


def costs_table(costs: dict[str, float]) -> Table:
    table = Table(title="CPU time of an actor for one message, sent alone, in ms (idle: per second)")
    for column in ("actor", "message", "ms"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    for kind, spent in costs.items():
        table.add_row(*kind.split("."), f"{spent:.3f}")
    return table


def scheduler_table(points: list[dict[str, Any]], target: dict[str, Any]) -> Table:
    table = Table(
        title=f"TAID scheduler: messages per second and CPU time, steps of {STEP_S:g} s",
        caption="Others: all messages but reports, as a part of the actor's CPU time and of a core. Target: at most "
        f"{target['share']:.0%} of its CPU time at {target['clients']} clients, {'met' if target['met'] else 'MISSED'}.",
    )
    for column in (
        "clients",
        "reports",
        "heartbeats",
        "polls",
        "% of a core",
        "ms per report",
        "others",
        "% of a core",
    ):
        table.add_column(column, justify="right")
    for point in points:
        actor = point["scheduler"]
        table.add_row(
            str(point["clients"]),
            *per_second(point, actor, ("report", "heartbeat", "news")),
            f"{actor['core_share']:.2%}",
            f"{1e3 * actor['cpu_s_by_kind']['report'] / actor['messages']['report']:.2f}",
            f"{actor['other_share']:.1%}",
            f"{actor['other_core_share']:.2%}",
        )
    return table


def lease_table(points: list[dict[str, Any]]) -> Table:
    table = Table(title="The teacher pool's lease: messages per second and CPU time")
    for column in ("clients", "renewals", "replicas' loads", "policy", "driver", "% of a core"):
        table.add_column(column, justify="right")
    for point in points:
        counts = per_second(point, point["lease"], ("renew", "report_load", "replicas", "failure"))
        table.add_row(str(point["clients"]), *counts, f"{point['lease']['core_share']:.2%}")
    return table


def per_second(point: dict[str, Any], actor: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    return [f"{actor['messages'].get(kind, 0) / point['seconds']:.1f}" for kind in kinds]


if __name__ == "__main__":
    main()
