"""The simulation against closed forms, and against what must hold for any pipeline."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from taid_ray.plan.pipeline import Pipeline, SimulatedStep, collective_s
from taid_ray.plan.simulation import simulate
from taid_ray.plan.simulation_kernel import Barrier, Clock, Link, Server, Signal
from taid_ray.run.bottleneck import WAITING
from taid_ray.student.prefetch import READ_AHEAD_STEPS

BASE = Pipeline(
    workers=1, replicas=1, micro_batches=2, forward_s=0.2, backward_s=0.4, optimizer_s=0.1, teacher_s=0.3,
    read_ahead_steps=READ_AHEAD_STEPS, steps=6,
)  # fmt: skip
OWN = 2 * (0.2 + 0.4) + 0.1
CLOSE: dict[str, Any] = {"rel": 1e-9, "abs": 1e-9}


def step(**changes: Any) -> float:
    return run(**changes).step_s


def run(**changes: Any) -> SimulatedStep:
    return simulate(replace(BASE, **changes))


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_teacher_without_limits_leaves_the_students_time(window: int) -> None:
    found = run(teacher_s=1e-6, window=window)
    assert found.step_s == pytest.approx(OWN, **CLOSE) and found.waits_for == "student"
    assert sum(found.waits.values()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("workers", "window"), [(1, 1), (1, 4), (3, 2)])
def test_one_slow_replica_sets_the_pace(workers: int, window: int) -> None:
    """It computes without a pause, one request after another."""
    found = run(workers=workers, teacher_s=3.0, window=window)
    assert found.step_s == pytest.approx(workers * 2 * 3.0, **CLOSE)
    assert found.waits_for == "teacher"
    assert sum(found.waits.values()) == pytest.approx(found.step_s - OWN, rel=0.02)  # or for another's teacher


def test_replicas_share_the_work() -> None:
    assert step(workers=4, replicas=4, teacher_s=3.0) == pytest.approx(2 * 3.0, **CLOSE)


@pytest.mark.parametrize("teacher_s", [0.3, 0.45, 1.0])
def test_a_window_of_one_is_a_round_trip_per_micro_batch(teacher_s: float) -> None:
    """A request leaves when the one before has come, and takes 0.2 s beside the computation.

    Meanwhile one micro-batch is computed, and between two steps the optimizer, too.
    """
    found = step(window=1, teacher_s=teacher_s, request_s=0.05, answer_s=0.15)
    assert found == pytest.approx(sum(max(teacher_s + 0.2, own) for own in (0.6, 0.7)), **CLOSE)


def test_a_deeper_window_hides_the_way_but_not_the_work() -> None:
    shallow, deep = (step(window=window, teacher_s=0.5, request_s=0.2, answer_s=0.2) for window in (1, 4))
    assert deep == pytest.approx(OWN, **CLOSE) and shallow == pytest.approx(2 * 0.9, **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_a_deeper_window_is_never_slower(seed: int) -> None:
    times = [step(workers=3, replicas=2, teacher_s=0.45, noise=0.3, seed=seed, window=w) for w in (1, 2, 4, 8)]
    assert all(later <= earlier * 1.02 for earlier, later in itertools.pairwise(times))
    assert times[-1] < times[0]


@pytest.mark.parametrize("seed", range(3))
def test_more_replicas_are_never_slower(seed: int) -> None:
    """But for chance: the routes and the replicas' noise are drawn anew."""
    times = [step(workers=8, replicas=r, teacher_s=0.6, noise=0.1, seed=seed, steps=20) for r in (1, 2, 4, 8, 16)]
    assert all(later <= earlier * 1.02 for earlier, later in itertools.pairwise(times))
    assert times[0] > 5 * times[-1]


def test_a_local_teacher_works_before_the_student() -> None:
    assert step(replicas=0) == pytest.approx(OWN + 2 * 0.3, **CLOSE)
    assert step(replicas=0, teacher_s=0.0) == pytest.approx(OWN, **CLOSE)


def test_work_is_conserved() -> None:
    for changes in ({}, {"teacher_s": 2.0}, {"workers": 3, "replicas": 2, "window": 1}):
        found, p = run(**changes), replace(BASE, **changes)
        assert found.worker_busy_s == pytest.approx(p.workers * (p.warm_up + p.steps) * OWN, **CLOSE)


def test_collectives_wait_for_all_and_take_time() -> None:
    """ZeRO-3 meets before each forward and with each backward pass, ZeRO-2 with the backward pass."""
    assert step(workers=4, replicas=4, reduce_s=0.05, update_s=0.02) == pytest.approx(OWN + 2 * 0.05 + 0.02, **CLOSE)
    assert step(workers=4, replicas=4, gather_s=0.1, reduce_s=0.05) == pytest.approx(OWN + 2 * 0.15, **CLOSE)
    assert step(reduce_s=0.05, update_s=0.02) == pytest.approx(OWN, **CLOSE)  # nobody to meet
    found = run(workers=4, replicas=4, reduce_s=0.2)
    assert found.waits_for == "collectives" and found.waits["collectives"] == pytest.approx(0.4)


def test_stragglers_hurt_more_the_more_there_are() -> None:
    times = [step(workers=w, replicas=w, noise=0.1, reduce_s=0.0, update_s=0.0, steps=20) for w in (1, 8, 64)]
    assert times[0] < times[1] < times[2]
    assert run(workers=64, replicas=64, noise=0.1, reduce_s=0.0, update_s=0.0).waits_for == "others"


def test_the_schedule_hides_behind_the_last_backward_pass() -> None:
    """All reports come when the last forward passes end; 0.4 s of backward pass and 0.1 s of optimizer follow."""
    assert step(workers=10, replicas=10, report_s=0.05) == pytest.approx(OWN, **CLOSE)
    found = run(workers=10, replicas=10, report_s=0.08)
    assert found.step_s == pytest.approx(OWN + 0.3, **CLOSE) and found.waits_for == "schedule"
    late = run(workers=2, replicas=2, latency_s=0.3)  # there and back
    assert late.step_s == pytest.approx(OWN + 0.1, **CLOSE)


def test_heartbeats_and_polls_take_their_share_of_the_scheduler() -> None:
    """Ten reports of 0.05 s fit behind 0.5 s of backward pass and optimizer just so; with a fifth less time they do not."""
    found = run(workers=10, replicas=10, report_s=0.05, background_share=0.2)
    assert found.step_s == pytest.approx(OWN + 10 * 0.05 / 0.8 - 0.5, **CLOSE)
    assert found.waits_for == "schedule" and found.waits["schedule"] == pytest.approx(0.125)


def test_reading_is_hidden_until_it_takes_longer_than_a_step() -> None:
    assert step(read_s=0.99 * OWN, warm_up=READ_AHEAD_STEPS + 2) == pytest.approx(OWN, **CLOSE)
    found = run(read_s=2 * OWN, steps=30)
    assert found.step_s == pytest.approx(2 * OWN, **CLOSE) and found.waits_for == "data"


@pytest.mark.parametrize("window", [9, 10, 16, 40])
def test_a_window_may_span_more_steps_than_are_read_ahead(window: int) -> None:
    """What is read ahead counts from what was sent, which is that many steps before the one that is computed."""
    deep: dict[str, Any] = {"micro_batches": 1, "window": window}
    found = run(**deep, read_s=0.01)
    assert found.step_s == pytest.approx(0.7, **CLOSE) and found.waits_for == "student"
    found = run(**deep, read_s=1.4)
    assert found.step_s == pytest.approx(1.4, **CLOSE) and found.waits_for == "data"


def test_a_deep_window_of_many_workers() -> None:
    """Without a teacher, whose requests would take most of the test's time."""
    found = run(workers=4096, replicas=0, teacher_s=0.0, micro_batches=1, window=40, read_s=0.01, steps=1, warm_up=1)
    assert found.step_s == pytest.approx(0.7, **CLOSE) and found.waits_for == "student"


def test_answers_share_links() -> None:
    """Four workers of one replica's link: 1 s per answer, whatever the teacher's speed; a worker's own link likewise."""
    link: dict[str, Any] = {"answer_bytes": 100.0, "link_bytes_per_s": 100.0, "teacher_s": 1e-6}
    assert step(workers=4, **link) == pytest.approx(4 * 2 * 1.0, **CLOSE)
    assert step(replicas=8, window=8, steps=200, **link) == pytest.approx(2 * 1.0, rel=0.03)  # they come out of order
    assert step(workers=4, replicas=1, **(link | {"link_bytes_per_s": 1e6})) == pytest.approx(OWN, rel=1e-2)


def test_a_seed_decides_everything() -> None:
    noisy: dict[str, Any] = {"workers": 4, "replicas": 3, "noise": 0.2, "update_s": 0.0}
    assert run(**noisy) == run(**noisy)
    assert step(**noisy) != step(seed=1, **noisy)


def test_what_costs_little_is_not_named() -> None:
    assert SimulatedStep(1.0, {"teacher": WAITING / 2}, 0).waits_for == "student"


def test_a_collective_of_many() -> None:
    assert collective_s(1e9, 1, 1e9, 1e-3) == 0
    assert collective_s(1e9, 2, 1e9, 0.1) == pytest.approx(2 * (0.5 + 0.1))
    assert collective_s(1e9, 4096, 1e9, 0.0, passes=1) == pytest.approx(4095 / 4096)
    assert collective_s(0, 4096, 1e9, 1.0) == 2 * 2 * 12  # a tree's hops, not 4,095


def test_a_deadlock_is_an_error() -> None:
    """Not a result: what has not happened took no time."""
    clock = Clock()

    def wait(signal: Signal) -> Any:
        yield clock.after(1.0)
        yield signal

    clock.start(wait(clock.after(2.0)))
    clock.run()
    clock.start(wait(Signal()))
    with pytest.raises(RuntimeError, match="1 processes wait after 3 s"):
        clock.run()


def test_a_server_serves_in_order() -> None:
    clock, server, order = Clock(), Server(), []

    def visit(name: int) -> Any:
        yield server.turn()
        yield clock.after(1.0)
        order.append((name, clock.now))
        server.leave()

    for name in range(3):
        clock.start(visit(name))
    assert len(server) == 3
    clock.run()
    assert order == [(0, 1.0), (1, 2.0), (2, 3.0)] and len(server) == 0


def test_a_barrier_ends_after_the_last_came() -> None:
    clock = Clock()
    barrier = Barrier(clock, 2, 0.5)
    clock.at(1.0, barrier.arrive)
    clock.at(3.0, barrier.arrive)
    ended: list[float] = []
    barrier.opened.calls.append(lambda: ended.append(clock.now))
    clock.run()
    assert ended == [3.5] and barrier.last == 3.0


def test_a_link_carries_one_at_a_time() -> None:
    link = Link()
    assert [link.carry(0.0, 2.0), link.carry(1.0, 2.0), link.carry(9.0, 1.0)] == [2.0, 4.0, 10.0]


def test_a_signal_happens_once_for_all() -> None:
    signal, heard = Signal(), []
    signal.calls += [lambda: heard.append(1), lambda: heard.append(2)]
    signal.fire()
    signal.fire()
    assert heard == [1, 2] and signal.done
