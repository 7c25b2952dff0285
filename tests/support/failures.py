"""What may happen to a run: who is hurt, how, what it ends, and how long it takes until the run makes new steps again."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from tests.support.harness import Run, wait_for_death

STUCK_S = 0.5
"""A replica stands still so long before it is killed, so that it has requests to lose. Nothing tells that it has."""

RESUMED = "going on after step "
"""What the log says of an attempt that has a checkpoint, a little after its first step."""


@dataclass(frozen=True)
class Failure:
    """StopRequest to processes of one run."""

    name: str
    victims: Callable[[Run, Random], list[int]]
    """Processes, found while the run trains."""
    ends: str
    """`attempt`, `driver`, or `nothing`."""
    numbers: tuple[int, ...] = (signal.SIGKILL,)
    """Sent one after another, STUCK_S apart."""
    exit_code: int = -signal.SIGKILL
    """Of the driver, if that is what ends."""

    def strike(self, victims: Iterable[int]) -> float:
        """Returns when the last signal was sent, by time.monotonic."""
        for number in self.numbers:
            if number != self.numbers[0]:
                time.sleep(STUCK_S)
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        return time.monotonic()


@dataclass(frozen=True)
class Recovery:
    failure: str
    step: int
    """The last one on file when it happened."""
    seconds: float
    """Until the next new step: from the failure, or from the command that started the driver again."""
    repeated: int
    """Steps that were computed again, from the last checkpoint."""


def rank(number: int) -> Callable[[Run, Random], list[int]]:
    return lambda run, rng: [run.rank(number)]


def one_of(class_name: str) -> Callable[[Run, Random], list[int]]:
    """Nobody if there is none at the moment."""

    def choose(run: Run, rng: Random) -> list[int]:
        found = run.pids(class_name)
        return [rng.choice(found)] if found else []

    return choose


def every(class_name: str) -> Callable[[Run, Random], list[int]]:
    return lambda run, rng: run.pids(class_name)


def driver(run: Run, rng: Random) -> list[int]:
    return [run.driver]


WORKER, REPLICA, STUCK_THEN_KILLED = "RayTrainWorker", "ServeReplica", (signal.SIGSTOP, signal.SIGKILL)
KILLED_RANK = Failure("student rank 0 killed", rank(0), "attempt")
HUNG_RANK = Failure("student rank 1 stopped (hangs)", rank(1), "attempt", (signal.SIGSTOP,))
KILLED_REPLICA = Failure("teacher replica killed amid requests", one_of(REPLICA), "nothing", STUCK_THEN_KILLED)
KILLED_SCHEDULER = Failure("TAID scheduler killed", every("SchedulerActor"), "nothing")
KILLED_CONTROLLER = Failure("Ray Train controller killed", every("TrainController"), "attempt")
KILLED_DRIVER = Failure("driver killed, run again", driver, "driver")
STOPPED_DRIVER = Failure("driver stopped (SIGTERM), run again", driver, "driver", (signal.SIGTERM,), 143)

AT_ANY_TIME = (
    Failure("student rank killed", one_of(WORKER), "attempt"),
    Failure("student rank stopped (hangs)", one_of(WORKER), "attempt", (signal.SIGSTOP,)),
    KILLED_REPLICA,
    Failure("all teacher replicas killed", every(REPLICA), "nothing"),
    KILLED_SCHEDULER,
    KILLED_CONTROLLER,
    KILLED_DRIVER,
    STOPPED_DRIVER,
)
"""Also before a run trains, or while it recovers."""


def inflict(run: Run, failure: Failure, step: int, rng: Random, *overrides: str) -> Recovery:
    """Lets `failure` happen once `step` is on file, and waits until new steps go on.

    overrides: of the configuration, for the driver that is started again if it is what ends.
    """
    run.wait_for_step(step - 1)
    victims, attempts = failure.victims(run, rng), run.attempts
    assert victims, f"nobody to hurt by: {failure.name}"
    run.wait_for_step(step)
    told, resumable = run.log.count(RESUMED), " saved (" in run.log
    struck = failure.strike(victims)
    if failure.ends == "nothing":
        reached = run.step + 1  # the step under way may have been through already
        run.wait_for_step(reached + 1)
        assert run.attempts == attempts, f"{failure.name} ended an attempt"
        return Recovery(failure.name, reached, time.monotonic() - struck, 0)
    if failure.ends == "driver":
        run.wait_for_end(failure.exit_code)
        if failure.exit_code > 0:
            run.check_nothing_left()
        struck = time.monotonic()
        run.start(*overrides)
    run.wait_for_attempt(attempts)
    reached = run.step
    run.wait_for_step(reached + 1)
    seconds = time.monotonic() - struck
    for pid in victims:
        wait_for_death(pid)  # a stopped one, too
    if resumable:
        run.until(lambda: run.log.count(RESUMED) > told, "word of the checkpoint it went on from")
    return Recovery(failure.name, reached, seconds, reached - run.resumed_from())


def shown(recoveries: Iterable[Recovery]) -> str:
    """As a Markdown table."""
    rows = [f"| {r.failure} | {r.step} | {r.seconds:.1f} | {r.repeated} |" for r in recoveries]
    return "\n".join(
        ["| failure | after step | s until a new step | steps computed again |", "|---|---|---|---|", *rows]
    )
