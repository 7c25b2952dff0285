"""The driver's loop around the student workers, without Ray: what is tried again, what ends the run, and when."""

import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from ray.train.v2.api.exceptions import WorkerGroupError

from taid_ray.config.fields import Range
from taid_ray.config.models import StudentConfig
from taid_ray.distributed.capacity import Demand
from taid_ray.driver import attempts, signals
from taid_ray.driver.attempts import AttemptContext, AttemptLoop
from taid_ray.driver.progress_relay import RunProgress
from taid_ray.driver.signals import StopRequest
from taid_ray.errors import AttemptError, ClusterError, DataError, WorkerError
from taid_ray.scheduler.aggregate import STOP
from taid_ray.student.spec import Finished, Stopped
from tests.support.journal import WITHIN_S, Journal

SUMMARY = {"steps": 9}
DONE = Finished(SUMMARY)
DEMAND = Demand("cpu", 1, 2, 1.0, 1, 1, 1, 1.0, True, True)


class Scheduler:
    def __init__(self) -> None:
        self.asked = Journal()

    def ask(self, request: int) -> None:
        self.asked.append(request)


class View:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def wait_for(self, activity: str) -> None:
        pass


class Driver:
    """Runs the loop over attempts that end as told."""

    def __init__(
        self,
        *outcomes: Any,
        room: Callable[[], int] = lambda: 1,
        free: Callable[[], int] = lambda: 9,
        failures: int = 2,
    ):
        """outcomes: what each attempt returns, raises, or does (a function of this object).

        room: for workers on the nodes, all free; free: for more of them, as things are.
        """
        self.outcomes, self.room, self.free = iter(outcomes), room, free
        self.scheduler, self.view, self.progress, self.stop = Scheduler(), View(), RunProgress(), StopRequest()
        self.student = StudentConfig(model="m", workers=Range(min=1, max=2), timeout_s=30.0, max_failures=failures)
        self.started: list[tuple[int, int]] = []

    def makes_steps(self, step: int) -> None:
        """The workers of the attempt under way report steps."""
        self.progress.step, self.progress.reporting = max(self.progress.step, step), self.before

    def begin(self, workers: int) -> int:
        self.before += 1
        self.started.append((workers, self.before))
        return self.before

    def run_attempt(self, attempt: int, workers: int) -> Any:
        assert (workers, attempt) == self.started[-1]
        outcome = next(self.outcomes)
        outcome = outcome(self) if callable(outcome) else outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def run(self, before: int = 0) -> Any:
        """before: attempts of earlier drivers."""
        self.before = before
        parts: Any = (DEMAND, self.scheduler, self.progress, self.stop, self.view)
        launcher: Any = SimpleNamespace(begin=self.begin, run=self.run_attempt)
        return AttemptLoop(self.student, AttemptContext(*parts)).run(launcher)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts time passes as soon as somebody waits."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(signals, "POLL_S", 0.01)
    monkeypatch.setattr(attempts, "GROW_CHECK_S", 0.0)
    monkeypatch.setattr(attempts, "workers_now", lambda demand: current[0].room())
    monkeypatch.setattr(attempts, "free_room", lambda demand: current[0].free())


current: list[Driver] = []


def driver(*outcomes: Any, **how: Any) -> Driver:
    current[:] = [Driver(*outcomes, **how)]
    return current[0]


def group(**failures: BaseException) -> WorkerGroupError:
    return WorkerGroupError("workers failed", {int(rank[1:]): failure for rank, failure in failures.items()})


def at_step(step: int, outcome: Any) -> Callable[[Driver], Any]:
    """An attempt that makes steps before it ends."""

    def attempt(driver: Driver) -> Any:
        driver.makes_steps(step)
        return outcome

    return attempt


def test_failures_are_followed_by_another_attempt() -> None:
    lost = ActorDiedError()
    found = driver(group(r0=RuntimeError("connection reset"), r1=lost), ActorDiedError(), DONE)
    assert found.run(before=3) == SUMMARY
    assert found.started == [(1, 4), (1, 5), (1, 6)]
    assert sum("going on from the last checkpoint" in line for line in found.view.said) == 2
    assert "ActorDiedError" in found.view.said[1], "the death of a process is the cause of the others' errors"


@pytest.mark.parametrize("rank", ["r0", "r1"])
def test_what_a_user_must_put_right_ends_the_run_on_whatever_rank_it_shows(rank: str) -> None:
    other = {"r0": "r1", "r1": "r0"}[rank]
    for secondary in (RuntimeError("reset"), AttemptError("the scheduler gave no answer")):
        found = driver(group(**{rank: DataError("row 3"), other: secondary}))
        with pytest.raises(DataError, match="row 3"):
            found.run()
        assert len(found.started) == 1


def test_a_hung_attempt_is_tried_again() -> None:
    assert driver(group(r0=AttemptError("no answer within 5 s")), DONE).run() == SUMMARY


def test_failures_without_progress_end_the_run_and_progress_starts_the_count_anew() -> None:
    crash = RuntimeError("bug")
    found = driver(*[at_step(4, group(r0=crash))] * 9, failures=2)
    with pytest.raises(WorkerError, match=r"failed 3 times in a row .*max_failures: 2.* step 4.*RuntimeError: bug"):
        found.run()
    assert len(found.started) == 3
    further = [at_step(step, group(r0=crash)) for step in (4, 8, 12, 16, 20)]
    assert driver(*further, DONE, failures=1).run() == SUMMARY


def test_too_little_room_is_waited_for_and_then_named() -> None:
    rooms = iter([0, 0, 1, 1, 1])
    assert driver(DONE, room=lambda: next(rooms)).run() == SUMMARY
    found = driver(DONE, room=lambda: 0)
    with pytest.raises(ClusterError, match=r"room for 0 of 1 student worker.* for 30 s \(student\.timeout_s"):
        found.run()
    assert not found.started


def test_workers_that_ray_cannot_start_are_tried_again() -> None:
    assert driver(ControllerError(RuntimeError("timed out")), DONE).run() == SUMMARY


def test_where_others_have_the_room_fewer_workers_are_started() -> None:
    """The nodes could hold two, but another run is on them."""
    full = ControllerError(RuntimeError("timed out"))
    found = driver(full, at_step(1, group(r0=ActorDiedError())), DONE, room=lambda: 2, free=lambda: 1)
    assert found.run() == SUMMARY
    assert found.started == [(2, 1), (1, 2), (2, 3)]
    crowded = driver(full, DONE, room=lambda: 2, free=lambda: 0)
    assert crowded.run() == SUMMARY and crowded.started == [(2, 1), (1, 2)], "never fewer than the fewest"


def until_asked(outcome: Any, signals: int = 0) -> Callable[[Driver], Any]:
    """An attempt in its steps that ends when it is asked to stop."""

    def attempt(driver: Driver) -> Any:
        driver.makes_steps(5)
        if signals:
            driver.stop.request(signals)
        driver.scheduler.asked.wait_for(STOP)
        return outcome

    return attempt


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_stops_the_workers_with_a_checkpoint(number: int, error: type[BaseException]) -> None:
    found = driver(until_asked(Stopped(5), number))
    with pytest.raises(error) as ended:
        found.run()
    assert getattr(ended.value, "code", 143) == 143
    assert "stopped after step 5, of which there is a checkpoint" in found.view.said


def test_a_signal_before_the_first_step_and_a_second_one_end_at_once() -> None:
    over = threading.Event()

    def never(driver: Driver) -> Any:
        driver.stop.request(signal.SIGINT)
        over.wait(WITHIN_S)
        return DONE

    with pytest.raises(KeyboardInterrupt):
        driver(never).run()
    over.set()


def test_more_room_restarts_the_workers_and_they_are_more() -> None:
    rooms = [1]

    def grown(driver: Driver) -> Any:
        rooms[0] = 2
        return until_asked(Stopped(5))(driver)

    found = driver(grown, DONE, room=lambda: rooms[0])
    assert found.run() == SUMMARY
    assert found.started == [(1, 1), (2, 2)]
    assert any("room for more student workers" in line for line in found.view.said)


def test_room_that_others_have_does_not_stop_the_workers() -> None:
    def steps(driver: Driver) -> Any:
        driver.makes_steps(5)
        looks.wait_length(2 * attempts.GROW_CHECKS)
        return DONE

    def free() -> int:
        looks.append("at the cluster")
        return 0

    looks = Journal()
    rooms = iter([1])  # when it starts; then nodes come, and another run takes them
    found = driver(steps, room=lambda: next(rooms, 2), free=free)
    assert found.run() == SUMMARY and found.started == [(1, 1)] and not found.scheduler.asked
