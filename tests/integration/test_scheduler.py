"""The TAID scheduler as a real actor: two ranks, killed at any moment, and the same t bit for bit."""

import queue
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from taid_ray.config.objective import ScheduleConfig
from taid_ray.errors import AttemptError, NonFiniteLossError, TeacherError
from taid_ray.scheduler import client as scheduler
from taid_ray.scheduler.actor import News
from taid_ray.scheduler.aggregate import LossAggregator, LossSums, StaleReportError, StepResult
from taid_ray.scheduler.client import SchedulerClient
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.scheduler.schedule import TAIDSchedule
from tests.support.waiting import wait_until

STEPS = 6
ATTEMPTS = count(1)
CONFIG = ScheduleConfig(t_start=0.2, alpha=0.3, beta=0.5)  # t depends on every loss before it
ANSWER_S = 120.0
"""More than Ray needs to restart the actor on a busy machine."""
# A rank's sums differ in size, so that the order of adding them shows in the last bits.
SUMS = [
    [
        LossSums(1 / 3 + 7.7 / step, 0.1 * step, 0.7, 10 + step, 0.5, 100),
        LossSums(3e3 / 7 / step, 1 / 3, 0.1, 977 - step),
    ]
    for step in range(1, STEPS + 1)
]


def undisturbed(steps: int = STEPS) -> list[StepResult]:
    """The same reports given to an aggregator in this process."""
    schedule = TAIDSchedule(CONFIG, STEPS)
    aggregator = LossAggregator(schedule, CONFIG.signal)
    aggregator.begin(1, 2, None)
    results = []
    for step, sums in enumerate(SUMS[:steps], 1):
        assert aggregator.report(1, step, 0, sums[0]) is None
        result = aggregator.report(1, step, 1, sums[1])
        assert result is not None
        results.append(result)
    return results


@pytest.fixture
def actor(ray_cluster: str) -> Iterator[Any]:
    handle = SchedulerOwner(f"scheduler-{time.time_ns()}", CONFIG, STEPS, max_workers=2).actor
    yield handle
    ray.kill(handle, no_restart=True)


@contextmanager
def ranks(actor: Any, result: StepResult | None = None) -> Iterator[list[SchedulerClient]]:
    """Two clients that have joined an attempt newer than all before, as two workers do."""
    clients = [SchedulerClient(actor, rank, ANSWER_S) for rank in (0, 1)]
    attempt = next(ATTEMPTS)
    clients[0].begin(attempt, 2)
    start = clients[0].join(attempt, 2, result)
    assert clients[1].join(attempt, 2, result) == start
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


def in_thread(function: Any, *arguments: Any) -> "Future[Any]":
    with_thread = ThreadPoolExecutor(1)
    future = with_thread.submit(function, *arguments)
    with_thread.shutdown(wait=False)
    return future


def collect(clients: list[SchedulerClient], step: int) -> list[StepResult]:
    waiting = [in_thread(client.collect, step) for client in clients]
    return [future.result(ANSWER_S) for future in waiting]


def answers(actor: Any, ask: Callable[[], Any]) -> Any:
    """What `ask` finds, or None while the actor is dead."""
    with suppress(ActorDiedError, ActorUnavailableError):
        return ray.get(ask(), timeout=ANSWER_S)
    return None


def kill(actor: Any) -> None:
    """What a dying process does: everything in the actor is lost, and Ray starts it anew. Returns once it is dead."""
    until_it_is_back(actor)
    ray.get(actor.note.remote("alive"), timeout=ANSWER_S)
    ray.kill(actor, no_restart=False)

    def is_dead() -> bool:
        found = answers(actor, lambda: actor.news.remote(0))
        return found is None or "alive" not in found.notes

    wait_until(is_dead, "the death of the actor", ANSWER_S)


def until_it_is_back(actor: Any) -> None:
    wait_until(lambda: answers(actor, lambda: actor.news.remote(0)), "the actor's restart", ANSWER_S)


def until_inside(actor: Any, holds: Callable[[Any], Any], what: str) -> None:
    """Waits until `holds` of the actor itself, or of its successor."""
    wait_until(lambda: answers(actor, lambda: actor.__ray_call__.remote(holds)), what, ANSWER_S)


def until_it_waits_in_the_actor(actor: Any, step: int, rank: int) -> None:
    """Until the actor has taken in the rank's report, and another one's is missing."""
    until_inside(
        actor,
        lambda self: self.aggregator.result.step == step - 1 and rank in self.aggregator._reports,
        f"the report of rank {rank} of step {step}",
    )


@pytest.fixture
def quick_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "HEARTBEAT_S", 0.1)


@pytest.fixture
def no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but reports bring a restarted actor back."""
    monkeypatch.setattr(scheduler, "HEARTBEAT_S", 1000.0)


def test_both_ranks_get_what_an_aggregator_here_gets(actor: Any) -> None:
    found = []
    with ranks(actor) as clients:
        for step, sums in enumerate(SUMS, 1):
            for client in clients[:: 1 if step % 2 else -1]:  # either rank may be first
                client.submit(step, sums[clients.index(client)])
            found.append(collect(clients, step))
    assert [first for first, _ in found] == undisturbed() == [second for _, second in found]
    ts = [first.schedule.t for first, _ in found]
    assert ts == sorted(ts) and ts[0] == 0.2 and ts[-1] > 0.5


def test_killed_before_the_workers_of_a_new_run_have_joined(actor: Any, quick_heartbeat: None) -> None:
    """While the model is built or the teacher loads, nobody knows a result that could bring the actor back."""
    clients = [SchedulerClient(actor, rank, ANSWER_S) for rank in (0, 1)]
    attempt = next(ATTEMPTS)
    clients[0].begin(attempt, 2)
    kill(actor)
    for joined in [in_thread(client.join, attempt, 2, None) for client in clients]:
        assert joined.result(ANSWER_S).step == 0
    found = []
    for step, sums in enumerate(SUMS, 1):
        for client in clients:
            client.submit(step, sums[client._rank])
        found.append(collect(clients, step)[0])
    for client in clients:
        client.close()
    assert found == undisturbed()


def test_killed_at_chosen_moments(actor: Any, quick_heartbeat: None) -> None:
    """Before any report of a step, after one rank's, and when only one rank has the answer."""
    found: list[list[StepResult]] = []
    with ranks(actor) as clients:
        for step, sums in enumerate(SUMS, 1):
            if step == 3:
                kill(actor)
            clients[0].submit(step, sums[0])
            if step == 4:
                until_it_waits_in_the_actor(actor, step, rank=0)
                kill(actor)
            clients[1].submit(step, sums[1])
            if step == 5:
                first = clients[0].collect(step)
                kill(actor)
                # Rank 1's answer is lost and it reports again. Rank 0 says nothing but heartbeats, as in a collective.
                clients[1]._pending = (step, sums[1], clients[1]._send(step, sums[1]))
                found.append([first, in_thread(clients[1].collect, step).result(ANSWER_S)])
            else:
                found.append(collect(clients, step))
    assert [first for first, _ in found] == undisturbed() == [second for _, second in found]


def test_the_next_report_brings_the_state_back_as_well(actor: Any, no_heartbeat: None) -> None:
    """Only rank 0 knows step 2 when the actor dies; its report of step 3 answers rank 1's repeated one of step 2."""
    with ranks(actor) as clients:
        for step in (1, 2):
            for client, sums in zip(clients, SUMS[step - 1], strict=True):
                client.submit(step, sums)
            found = collect(clients[: 3 - step], step)
        kill(actor)
        clients[1]._pending = (2, SUMS[1][1], clients[1]._send(2, SUMS[1][1]))
        second = in_thread(clients[1].collect, 2)
        until_it_waits_in_the_actor(actor, 2, rank=1)
        assert not second.done()
        clients[0].submit(3, SUMS[2][0])
        assert second.result(ANSWER_S) == found[0] == undisturbed()[1]
        clients[1].submit(3, SUMS[2][1])
        assert collect(clients, 3) == [undisturbed()[2]] * 2


def test_killed_at_random_moments(actor: Any, quick_heartbeat: None) -> None:
    """A rank that comes to such a moment has the actor killed, and goes on meanwhile, as does the other one."""
    draw = random.Random(0)
    chosen = {(step, draw.randrange(2), draw.choice(("reports", "reported"))) for step in draw.sample(range(1, 6), 4)}
    moments: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def kill_each_time() -> int:
        kills = 0
        while moments.get():
            kill(actor)
            kills += 1
        return kills

    def train(client: SchedulerClient, rank: int) -> list[StepResult]:
        def at(step: int, what: str) -> None:
            if (step, rank, what) in chosen:
                moments.put(True)

        results = []
        for step, sums in enumerate(SUMS, 1):
            at(step, "reports")
            client.submit(step, sums[rank])
            at(step, "reported")
            results.append(client.collect(step))
        return results

    with ranks(actor) as clients:
        killer = in_thread(kill_each_time)
        trained = [in_thread(train, client, rank) for rank, client in enumerate(clients)]
        try:
            found = [future.result(2 * ANSWER_S) for future in trained]
        finally:
            moments.put(False)
        assert killer.result(2 * ANSWER_S) == len(chosen)
    assert found == [undisturbed(), undisturbed()]


@pytest.mark.parametrize("killed_between", [False, True])
def test_a_new_attempt_starts_from_its_checkpoint_and_the_dead_one_is_refused(
    actor: Any, no_heartbeat: None, killed_between: bool
) -> None:
    with ranks(actor) as old:
        for step in (1, 2, 3):
            for client, sums in zip(old, SUMS[step - 1], strict=True):
                client.submit(step, sums)
            results = collect(old, step)
        old[1].submit(4, LossSums(1e9, 0.0, 0.0, 1))  # waits for rank 0, which is dead
        if killed_between:
            kill(actor)
        with ranks(actor, undisturbed()[0]) as new:  # back to the checkpoint after step 1
            with pytest.raises(StaleReportError, match="refused"):
                old[1].collect(4)
            for number in (2, 4):  # late, whatever step it is about
                old[0].submit(number, LossSums(1e9, 0.0, 0.0, 1))
                with pytest.raises(StaleReportError, match="refused"):
                    old[0].collect(number)
            for step in (2, 3):
                for client, sums in zip(new, SUMS[step - 1], strict=True):
                    client.submit(step, sums)
                assert collect(new, step) == [undisturbed()[step - 1]] * 2
    assert results == [undisturbed()[2]] * 2
    with ranks(actor) as fresh:  # and without a checkpoint from the beginning
        for client, sums in zip(fresh, SUMS[0], strict=True):
            client.submit(1, sums)
        assert collect(fresh, 1) == [undisturbed()[0]] * 2


def test_a_loss_that_is_not_finite_reaches_every_rank(actor: Any) -> None:
    with ranks(actor) as clients:
        clients[0].submit(1, SUMS[0][0])
        until_it_waits_in_the_actor(actor, 1, rank=0)
        clients[1].submit(1, LossSums(float("nan"), 0.0, 0.0, 5))
        for client in clients:
            with pytest.raises(NonFiniteLossError, match=r"step 1 is nan; t stays 0\.2"):
                client.collect(1)
    with ranks(actor) as clients:  # the next attempt knows nothing of it
        for client, sums in zip(clients, SUMS[0], strict=True):
            client.submit(1, sums)
        assert collect(clients, 1) == [undisturbed()[0]] * 2


def test_no_answer_before_the_deadline(actor: Any) -> None:
    with ranks(actor) as clients:
        clients[0]._timeout_s = 0.5
        clients[0].submit(1, SUMS[0][0])
        with pytest.raises(AttemptError, match=r"no answer for step 1 within 0 s .*another student worker"):
            clients[0].collect(1)


def test_an_actor_that_is_gone_for_good(actor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks(actor) as clients:
        ray.kill(actor, no_restart=True)
        monkeypatch.setattr(scheduler, "GONE_S", 0.5)
        clients[0].submit(1, SUMS[0][0])
        with pytest.raises(AttemptError, match="scheduler actor is gone"):
            clients[0].collect(1)


def test_waiting_for_the_pool(actor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [SchedulerClient(actor, rank, ANSWER_S) for rank in (0, 1)]
    waiting = [in_thread(client.wait_for_pool, ANSWER_S) for client in clients]

    def until_both_ask() -> None:
        until_inside(actor, lambda self: len(self._changed._waiters) == 2, "both to wait in the actor")

    until_both_ask()
    clients[0].begin(next(ATTEMPTS), 2)  # wakes everybody inside the actor, but is no word about the pool
    until_both_ask()  # again
    assert not any(future.done() for future in waiting)
    kill(actor)  # the waiting goes on at the restarted actor
    until_it_is_back(actor)
    ray.get(actor.set_pool.remote(TeacherError("teacher.model: broken")), timeout=ANSWER_S)
    for future in waiting:
        with pytest.raises(TeacherError, match=r"teacher\.model: broken"):
            future.result(ANSWER_S)
    ray.get(actor.set_pool.remote(None), timeout=ANSWER_S)
    SchedulerClient(actor, 1, ANSWER_S).wait_for_pool(ANSWER_S)


def test_notes_and_the_step_reach_the_driver_across_a_restart(actor: Any) -> None:
    def say(note: str) -> None:
        ray.get(actor.note.remote(note), timeout=ANSWER_S)

    def news(seen: int) -> News:
        found: News = ray.get(actor.news.remote(seen), timeout=ANSWER_S)
        return found

    with ranks(actor) as clients:
        clients[0].note("one")
        wait_until(lambda: news(0) == News(["one"], 0, 0), "what the worker says", ANSWER_S)
        say("two")
        assert news(0).notes == ["one", "two"] and news(1).notes == ["two"]
        for client, sums in zip(clients, SUMS[0], strict=True):
            client.submit(1, sums)
        collect(clients, 1)
        attempt = clients[0]._attempt
        assert news(2) == News([], 1, attempt)
        kill(actor)
        until_it_is_back(actor)
        wait_until(lambda: news(2).step == 1, "the step, by a heartbeat", ANSWER_S)
        assert news(2).notes == []
        say("three")
        assert news(2).notes == ["three"]
        say("four")
        assert news(3).notes == ["four"]
    with ranks(actor):
        assert news(4).reporting != attempt + 1, "the workers of the new attempt have made no step"


def test_a_zombie_of_an_earlier_attempt_is_refused_by_a_restarted_actor(actor: Any) -> None:
    """Attempts are numbered by run.json, not by the clock of the node that the actor happens to run on."""
    with ranks(actor) as old, ranks(actor) as new:
        kill(actor)
        until_it_is_back(actor)
        old[0].submit(1, SUMS[0][0])  # the zombie is the first to speak
        until_inside(actor, lambda self: self.aggregator.attempt > 0, "the actor to have heard of an attempt")
        for client, sums in zip(new, SUMS[0], strict=True):
            client.submit(1, sums)
        assert collect(new, 1) == undisturbed(1) * 2
        with pytest.raises(StaleReportError):
            old[0].collect(1)
