"""What the driver's threads do when what they look after fails: they say so once, and go on."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from taid_ray.config.schema import build_config
from taid_ray.driver import supervise
from taid_ray.driver.attempts import AttemptMonitor
from taid_ray.driver.signals import StopRequest
from taid_ray.driver.supervise import RunProgress, followed, teacher_pool
from taid_ray.teacher.pool.deployment import PoolSpec
from tests.support.waiting import wait_until

WITHIN_S = 60.0
PLAN: Any = SimpleNamespace(total_steps=40, vocabulary=SimpleNamespace(num_shared=7))
DEMAND: Any = SimpleNamespace(replicas=1, max_replicas=1, shards=1, device="cpu", teacher_role=False, max_workers=1)
CONFIG = build_config(
    {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}, "train": {"steps": 40}}
)


class View:
    """Keeps what is said; tells whoever waits for it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[int] = []
        self._changed = threading.Condition()

    def say(self, message: str, role: str = "driver") -> None:
        with self._changed:
            self.said.append(message)
            self._changed.notify_all()

    def step(self, metrics: dict[str, Any], total_steps: int) -> None:
        with self._changed:
            self.steps.append(metrics["step"])
            self._changed.notify_all()

    def wait_for(self, activity: str) -> None:
        pass

    def until(self, met: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(met, WITHIN_S), self.said


class Board:
    """A scheduler actor whose answers are told in advance; afterwards the last one again and again."""

    def __init__(self, *answers: Any):
        self._answers, self.asked = list(answers), 0
        self.requests: list[int] = []

    def progress(self, notes_seen: int) -> Any:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, request: int) -> None:
        self.requests.append(request)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(supervise, "POLL_S", 0.001)
    monkeypatch.setattr(supervise, "RETELL_S", 0.001)
    yield


def metrics(step: int, validations: Any = ()) -> Any:
    return [], {"step": step}, list(validations)


def test_who_is_told_of_validations_may_fail_and_hears_of_them_again() -> None:
    """Ray Tune's schedulers must not miss a validation because of a disk that was full for a moment."""
    told: list[int] = []
    full = [True, True]

    def tell(figures: dict[str, Any]) -> None:
        if full:
            full.pop()
            raise OSError("no space left")
        told.append(figures["step"])

    view: Any = View()
    answers = [metrics(step, [{"step": 0}, {"step": 10}]) for step in (1, 2, 3, 4)]
    board: Any = Board(*answers)
    with followed(board, PLAN, view, tell) as progress:
        view.until(lambda: view.steps == [1, 2, 3, 4])
    assert progress.step == 4 and told == [0, 10] and not progress.blind
    assert len(view.said) == 1 and "no space left" in view.said[0]


def test_a_moment_of_blindness_does_not_keep_a_run_that_has_made_no_step() -> None:
    view: Any = View()
    board: Any = Board(ValueError("once"), ([], {}, []))
    with followed(board, PLAN, view) as progress:
        wait_until(lambda: board.asked > 2, "the driver to see again")
        wait_until(lambda: not progress.blind, "the driver to know it")
        with pytest.raises(SystemExit):
            AttemptMonitor(DEMAND, 1, board, progress, StopRequest(15, 1), view).look()


def test_a_signal_asks_for_a_checkpoint_where_the_driver_cannot_see_the_steps() -> None:
    """Else it would end the run as one that has not made a step."""
    view: Any = View()
    board: Any = Board(ValueError("what the actor answered cannot be read"))
    with followed(board, PLAN, view) as progress:
        view.until(lambda: bool(view.said))
        for _ in range(2):  # a new attempt begins without a step, and is not seen either
            progress.training = False
            wait_until(lambda: progress.blind, "the driver knows that it sees nothing")
            watch = AttemptMonitor(DEMAND, 1, board, progress, StopRequest(15, 1), view)
            watch.look()
    assert len(board.requests) == 2


def test_a_signal_before_the_first_step_ends_at_once() -> None:
    with pytest.raises(SystemExit):
        AttemptMonitor(DEMAND, 1, Board(metrics(0)), RunProgress(), StopRequest(15, 1), View()).look()  # type: ignore[arg-type]


def test_the_end_does_not_wait_for_ever_for_who_is_told_of_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FOLLOW_END_S", 0.01)
    entered, release = threading.Event(), threading.Event()

    def blocks(figures: dict[str, Any]) -> None:
        entered.set()
        release.wait(WITHIN_S)

    view: Any = View()
    board: Any = Board(metrics(1, [{"step": 0}]))
    with followed(board, PLAN, view, blocks):
        assert entered.wait(WITHIN_S)
    assert not release.is_set() and "has not ended within" in view.said[-1]
    release.set()


def test_news_of_the_pool_may_fail_and_the_workers_are_told_of_the_pool_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A restarted scheduler actor must hear that the pool is up, or the workers of the next attempt would wait for ever."""

    class AttemptMonitor:
        def __init__(self, name: str):
            pass

        def news(self) -> list[str]:
            raise failures.pop(0) if len(failures) > 1 else failures[0]

    failures: list[Exception] = [RayError("restarting"), ValueError("not to be read")]
    told, enough, started = [], threading.Event(), list[PoolSpec]()

    def tell(error: Exception | None) -> None:
        told.append(error)
        if len(told) >= 6:
            enough.set()

    info = SimpleNamespace(num_parameters=1, dtype="float32", dropped_mass=0.0)
    monkeypatch.setattr(supervise, "PoolWatch", AttemptMonitor)
    monkeypatch.setattr(supervise, "start_pool", lambda spec, *given, **options: started.append(spec) or info)
    monkeypatch.setattr(supervise, "stop_pool", lambda name: None)
    monkeypatch.setattr(supervise, "keep_lease", lambda name: lambda: None)
    view: Any = View()
    with teacher_pool(CONFIG, PLAN, DEMAND, "pool", tell, view):
        assert enough.wait(WITHIN_S)
    assert set(told) == {None}
    assert started[0].max_workers == DEMAND.max_workers, "for the queues of the replicas"
    assert [line for line in view.said if "not to be read" in line] == [
        "watching the teacher pool failed (ValueError: not to be read); the run goes on, and it is tried again"
    ]
