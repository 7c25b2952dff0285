"""The driver's relay of the workers' progress: what it hears, what it shows, and what happens when either fails."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from taid_ray.driver import progress_relay as module
from taid_ray.driver.attempts import AttemptContext, AttemptMonitor
from taid_ray.driver.progress_relay import RunProgress, progress_relay
from taid_ray.driver.signals import StopRequest
from taid_ray.files import write_lines
from taid_ray.scheduler.actor import News
from tests.support.views import WITHIN_S, View
from tests.support.waiting import wait_until

TOTAL_STEPS = 40


class Actor:
    """A scheduler actor whose answers are told in advance; afterwards the last one again and again."""

    def __init__(self, *answers: Any):
        self._answers, self.asked = list(answers), 0
        self.requests: list[int] = []

    def news(self, notes_seen: int) -> Any:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, request: int) -> None:
        self.requests.append(request)


NOTHING = News([], 0, 0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "POLL_S", 0.001)
    yield


def write_steps(run_dir: Path, first: int, last: int) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            file.write(json.dumps({"step": step}) + "\n")


def write_validations(run_dir: Path, *steps: int) -> None:
    write_lines(run_dir / "validation.jsonl", [{"step": step} for step in steps])


def monitor(actor: Any, progress: RunProgress, stop: StopRequest, view: Any = None) -> AttemptMonitor:
    """The watch over attempt 2, of one worker where there may be one."""
    demand: Any = SimpleNamespace(max_workers=1)
    return AttemptMonitor(AttemptContext(demand, actor, progress, stop, view or View()), 2, 1)


def test_steps_are_shown_as_the_file_grows_and_those_of_earlier_drivers_are_not(tmp_path: Path) -> None:
    view: Any = View()
    write_steps(tmp_path, 1, 5)
    actor: Any = Actor(NOTHING)
    with progress_relay(actor, tmp_path, TOTAL_STEPS, view):
        shown = [6, 7]
        for step in shown:
            write_steps(tmp_path, step, step)
            view.until(lambda step=step: view.steps[-1:] == [step])
        assert view.steps == shown


def test_steps_that_are_made_again_are_shown_again(tmp_path: Path) -> None:
    """Workers that died go on from a checkpoint; the terminal must not stand still until they have caught up."""
    view: Any = View()
    actor: Any = Actor(NOTHING)
    with progress_relay(actor, tmp_path, TOTAL_STEPS, view):
        write_steps(tmp_path, 1, 9)
        view.until(lambda: view.steps[-1:] == [9])
        (tmp_path / "new").mkdir()
        write_steps(tmp_path / "new", 1, 5)
        (tmp_path / "new" / "metrics.jsonl").replace(tmp_path / "metrics.jsonl")
        view.until(lambda: view.steps[-1:] == [5])
        write_steps(tmp_path, 6, 6)
        view.until(lambda: view.steps[-1:] == [6])


def test_a_blocked_follower_of_validations_does_not_keep_the_driver_from_hearing(tmp_path: Path) -> None:
    """Or a signal would find it believing that there is no step yet, and end the run without a checkpoint."""
    entered, release = threading.Event(), threading.Event()

    def blocks(figures: dict[str, Any]) -> None:
        entered.set()
        release.wait(WITHIN_S)

    view: Any = View()
    write_validations(tmp_path, 0)
    actor: Any = Actor(NOTHING, NOTHING, News([], 57, 2))
    with progress_relay(actor, tmp_path, TOTAL_STEPS, view, blocks) as progress:
        assert entered.wait(WITHIN_S)
        wait_until(lambda: progress.step == 57, "the step")
        assert progress.may_have_steps(2)
        release.set()


def test_an_actor_that_does_not_answer_makes_the_driver_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = RunProgress()
    assert not progress.may_have_steps(2)
    monkeypatch.setattr(module, "BLIND_S", -1.0)
    assert progress.blind and progress.may_have_steps(2)


def test_each_validation_is_told_once_but_for_the_last_one(tmp_path: Path) -> None:
    """Those of earlier attempts, too; the last one belongs to the summary."""
    told: list[int] = []
    view: Any = View()
    write_validations(tmp_path, 0, 10)
    with progress_relay(Actor(NOTHING), tmp_path, TOTAL_STEPS, view, lambda line: told.append(line["step"])):  # type: ignore[arg-type]
        wait_until(lambda: told == [0, 10], "the earlier ones")
        write_validations(tmp_path, 0, 10, 20)
        wait_until(lambda: told == [0, 10, 20], "the new one")
        write_validations(tmp_path, 0, 10, 20, TOTAL_STEPS)
    assert told == [0, 10, 20]


def test_who_is_told_of_validations_may_fail_and_hears_of_them_again(tmp_path: Path) -> None:
    """Ray Tune's schedulers must not miss a validation because of a disk that was full for a moment."""
    told: list[int] = []
    full = [True, True]

    def tell(figures: dict[str, Any]) -> None:
        if full:
            full.pop()
            raise OSError("no space left")
        told.append(figures["step"])

    view: Any = View()
    write_validations(tmp_path, 0, 10)
    with progress_relay(Actor(News([], 4, 1)), tmp_path, TOTAL_STEPS, view, tell) as progress:  # type: ignore[arg-type]
        wait_until(lambda: told == [0, 10], "the validations")
        wait_until(lambda: progress.step == 4, "the step")
        assert not progress.blind
    assert len(view.said) == 1 and "no space left" in view.said[0]


def test_notes_are_shown_once_and_a_restarted_actor_does_not_make_the_driver_forget(tmp_path: Path) -> None:
    view: Any = View()
    actor: Any = Actor(News(["one"], 3, 2), RayError("restarting"), News(["two"], 0, 0))
    with progress_relay(actor, tmp_path, TOTAL_STEPS, view) as progress:
        view.until(lambda: view.said[:2] == ["one", "two"])
        wait_until(lambda: not progress.blind, "the driver to hear again")
        assert (progress.step, progress.reporting) == (3, 2)
        assert not any("restarting" in line for line in view.said), "which is nothing that anybody must know"


def test_a_moment_of_blindness_does_not_keep_a_run_that_has_made_no_step(tmp_path: Path) -> None:
    view: Any = View()
    actor: Any = Actor(ValueError("once"), NOTHING)
    with progress_relay(actor, tmp_path, TOTAL_STEPS, view) as progress:
        wait_until(lambda: actor.asked > 2 and not progress.blind, "the driver to hear again")
        with pytest.raises(SystemExit):
            monitor(actor, progress, StopRequest(15, 1)).poll()


@pytest.mark.parametrize("failure", [ValueError("what the actor answered cannot be read"), RayError("restarting")])
def test_a_signal_asks_for_a_checkpoint_where_the_driver_cannot_hear_of_the_steps(
    tmp_path: Path, failure: Exception
) -> None:
    """Else it would end the run as one that has not made a step."""
    view: Any = View()
    actor: Any = Actor(failure)
    with progress_relay(actor, tmp_path, TOTAL_STEPS, view) as progress:
        wait_until(lambda: progress.blind, "the driver to know that it hears nothing")
        monitor(actor, progress, StopRequest(15, 1), view).poll()
    assert len(actor.requests) == 1


def test_a_signal_before_the_first_step_of_the_attempt_ends_at_once() -> None:
    for reporting in (0, 1):  # an earlier attempt has made steps, and there is a checkpoint of them, or none
        with pytest.raises(SystemExit):
            monitor(Actor(NOTHING), RunProgress(7, reporting), StopRequest(15, 1)).poll()


def test_the_end_does_not_wait_for_ever_for_who_is_told_of_validations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END_S", 0.01)
    entered, release = threading.Event(), threading.Event()

    def blocks(figures: dict[str, Any]) -> None:
        entered.set()
        release.wait(WITHIN_S)

    view: Any = View()
    write_validations(tmp_path, 0)
    with progress_relay(Actor(NOTHING), tmp_path, TOTAL_STEPS, view, blocks):  # type: ignore[arg-type]
        assert entered.wait(WITHIN_S)
    assert not release.is_set() and "has not ended within" in view.said[-1]
    release.set()
