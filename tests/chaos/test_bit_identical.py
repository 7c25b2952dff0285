"""A run that is hurt in every way on its way ends with the weights of one that nobody touched, bit for bit."""

import os
import signal
from contextlib import suppress
from random import Random

import pytest
import ray
from ray import serve

from tests.support.failures import (
    HUNG_RANK,
    KILLED_CONTROLLER,
    KILLED_DRIVER,
    KILLED_RANK,
    KILLED_REPLICA,
    KILLED_SCHEDULER,
    REPLICA,
    STOPPED_DRIVER,
    Failure,
    inflict,
    shown,
)
from tests.support.harness import GONE_S, RESULTS, NewRun, Run, check_same_result, small_config, wait_for_death
from tests.support.paths import BUNDLE
from tests.support.waiting import wait_until

SEED = 4
EVERY = 6
"""One failure in so many steps."""
ALONE_S = 60.0
"""Within this time a run whose driver is gone for good must have left the cluster."""


@pytest.mark.timeout(900)
def test_every_part_killed_once(new_run: NewRun, baseline: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank, a replica, the scheduler and the driver, one after another in the same run."""
    run = new_run(small_config("chaos"))
    run.start()
    killed = [KILLED_RANK, KILLED_REPLICA, KILLED_SCHEDULER, KILLED_DRIVER]
    hurt_one_after_another(run, baseline, [(failure, ()) for failure in killed], capsys)


@pytest.mark.more
@pytest.mark.timeout(900)
def test_a_controller_killed_and_a_driver_stopped(
    new_run: NewRun, baseline: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver that takes over has the teacher in the workers' own processes."""
    run = new_run(small_config("chaos-more"))
    run.start()
    at_last = ("teacher.mode=local", "teacher.replicas=1")
    hurt_one_after_another(run, baseline, [(KILLED_CONTROLLER, ()), (STOPPED_DRIVER, at_last)], capsys)


@pytest.mark.more
@pytest.mark.timeout(900)
def test_a_run_without_a_teacher(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    """It comes back from its failures as any other; and a teacher that validations alone ask changes nothing of it."""
    student = {"init": "pretrained", "layers": None, "model": str(BUNDLE / "stories260k")}
    changes = {"student": student, "loss": {"name": "sft"}}
    teacher = {"mode": "local", "replicas": 1}
    evaluated = new_run(small_config("sft-evaluated", **changes, teacher=teacher))
    evaluated.start()
    evaluated.wait_for_end()
    run = new_run(small_config("sft-alone", **changes, teacher=None))
    run.start()
    inflict_all = [(KILLED_RANK, ()), (KILLED_SCHEDULER, ()), (KILLED_DRIVER, ())]
    hurt_one_after_another(run, evaluated, inflict_all, capsys, ("tokens", "steps"))
    validations = [run.summary["validations"], evaluated.summary["validations"]]
    alone, compared = ([line["cross_entropy"] for line in lines] for lines in validations)
    assert alone == pytest.approx(compared, rel=1e-7) and len(alone) == 6  # two ways to the same normaliser
    assert all("kl" in line for line in validations[1]) and not any("kl" in line for line in validations[0])
    asked = evaluated.summary["teacher_tokens"]
    assert (
        "teacher" not in run.summary and "teacher_tokens" not in run.summary and 0 < asked < run.summary["tokens"] / 10
    )


def hurt_one_after_another(
    run: Run,
    baseline: Run,
    failures: list[tuple[Failure, tuple[str, ...]]],
    capsys: pytest.CaptureFixture[str],
    compared: tuple[str, ...] = RESULTS,
) -> None:
    """Lets one failure happen in every EVERY steps, each with the overrides for a driver that is started again."""
    rng = Random(SEED)
    recoveries = []
    for number, (failure, overrides) in enumerate(failures):
        step = EVERY * number + rng.randint(1, EVERY)
        recoveries.append(inflict(run, failure, step, rng, *overrides))
        with capsys.disabled():
            print(f"\n{recoveries[-1]}", end="", flush=True)
    run.wait_for_end()
    run.check_nothing_left()
    with capsys.disabled():
        print(f"\n{shown(recoveries)}")
    check_same_result(run, baseline, compared)
    ended_attempts = sum(failure.ends != "nothing" for failure, _ in failures)
    assert run.attempts - 1 >= ended_attempts and run.summary["restarts"] == run.attempts - 1


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_rank_that_hangs(new_run: NewRun, baseline: Run) -> None:
    """It is noticed after student.timeout_s + teacher.timeout_s. A pool needs more than that to start."""
    rng = Random(SEED)
    run = new_run(small_config("chaos-hung"))
    run.start("student.timeout_s=20", "teacher.timeout_s=6", "teacher.mode=local", "teacher.replicas=1")
    inflict(run, HUNG_RANK, EVERY, rng)
    run.wait_for_end()
    run.check_nothing_left()
    check_same_result(run, baseline)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_pool_that_does_not_come_back_ends_the_run(new_run: NewRun, baseline: Run) -> None:
    """Loudly, within teacher.timeout_s; and the run can be resumed."""
    run = new_run(small_config("chaos-pool"))
    # The pool must come up within it, on this machine as busy as it is.
    patience_s = 10 + 1.5 * baseline.seconds_until("teacher pool is ready")
    run.start(f"teacher.timeout_s={patience_s}", "teacher.replicas=1")
    run.wait_for_step(5)

    def ends_while_all_replicas_are_killed() -> bool:
        for pid in run.pids(REPLICA):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return run.ended

    wait_until(ends_while_all_replicas_are_killed, "the end of the run", 2 * patience_s + GONE_S)
    run.wait_for_end(2)
    message = run.log.rpartition("error: ")[2]
    assert "no answer from the teacher pool" in message and "teacher.timeout_s" in message
    run.check_nothing_left()
    run.start()
    run.wait_for_end()
    run.check_nothing_left()
    check_same_result(run, baseline)


class Neighbour:
    """An actor of somebody else."""

    def answer(self) -> int:
        return 42


class NeighbourApp:
    """A Serve application of somebody else."""

    def __call__(self) -> int:
        return 43


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_run_without_a_driver_leaves_the_cluster(new_run: NewRun) -> None:
    """By itself, and leaves alone what belongs to others."""
    options = {"name": "chaos-neighbour", "namespace": "taid-ray", "lifetime": "detached", "num_cpus": 0}
    actor = ray.remote(Neighbour).options(**options).remote()
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(NeighbourApp, ray_actor_options={"num_cpus": 0.1})
    handle = serve.run(deployment.bind(), name="chaos-neighbour", route_prefix=None)
    try:
        run = new_run(small_config("chaos-alone", teacher={"idle_timeout_s": 8}))
        run.start()
        run.wait_for_step(2)
        processes = run.pids("")
        assert len(processes) >= 7  # scheduler, lease, controller, two ranks, two replicas; Ray Train has helpers
        run.kill_driver()
        run.check_left_cluster(ALONE_S)
        for pid in processes:
            wait_for_death(pid)
        assert ray.get(actor.answer.remote()) == 42 and handle.remote().result(timeout_s=10) == 43
    finally:
        ray.kill(actor)
        serve.delete("chaos-neighbour")
