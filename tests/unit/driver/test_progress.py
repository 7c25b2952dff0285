import io
import re
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from taid_ray.driver import progress
from taid_ray.driver.progress import ProgressView
from tests.support.journal import WITHIN_S, Journal

LINE = re.compile(r"\[ *(\d+\.\d)s\] (.*)")


class Lines(io.StringIO):
    """Remembers when each line was written, and tells of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self.times = Journal()

    def write(self, text: str) -> int:
        count = super().write(text)
        self.times.extend([self._clock()] * text.count("\n"))
        return count


class Scene:
    """A view without its thread, in a time that passes only as told, in steps that floating point adds exactly."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.out = Lines(lambda: self.now)
        self.view = ProgressView(Console(file=self.out, width=60), clock=lambda: self.now)

    def wait(self, seconds: float) -> None:
        """Lets the view look as often as its thread does."""
        for _ in range(int(seconds / progress.TICK_S)):
            self.now += progress.TICK_S
            self.view.look()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def fillers() -> list[threading.Thread]:
    """The threads of views that fill silences."""
    return [thread for thread in threading.enumerate() if thread.name == "taid-progress"]


def messages(out: io.StringIO) -> list[str]:
    found = [LINE.fullmatch(line) for line in out.getvalue().splitlines()]
    assert all(found), out.getvalue()
    return [match[2] for match in found if match]


def metrics(step: int, **others: Any) -> dict[str, Any]:
    return {"step": step, "t": 0.41234, "loss": 2.5, "kl": 1.25, "step_s": 2.0} | others


def test_the_promise_of_five_seconds_is_kept() -> None:
    assert progress.SILENCE_S + progress.TICK_S < 5 and progress.FIGURES_S < progress.SILENCE_S


def test_never_silent_and_says_what_it_waits_for(scene: Scene) -> None:
    start = scene.now
    scene.wait(6)
    scene.view.say("loading the [teacher] from [/models]")
    scene.wait(12)
    moments = [start, *scene.out.times, scene.now]
    assert max(b - a for a, b in pairwise(moments)) <= progress.SILENCE_S + progress.TICK_S
    assert messages(scene.out) == [
        "... still at: starting (4 s)",
        "loading the [teacher] from [/models]",
        *(f"... still at: loading the [teacher] from [/models] ({seconds} s)" for seconds in (4, 8, 12)),
    ]


def test_a_thread_looks_until_the_end_and_writes_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_S", 0.001)
    now = [1000.0]
    out = Lines(lambda: now[0])
    with ProgressView(Console(file=out, width=60), clock=lambda: now[0]) as view:
        assert fillers()
        now[0] += 4.5
        out.times.wait_for(now[0])
        now[0] += 4.5
        out.times.wait_for(now[0])
        view.say("done")
    for thread in fillers():
        thread.join(WITHIN_S)
    now[0] += 1000
    assert not fillers()
    assert messages(out) == ["... still at: starting (4 s)", "... still at: starting (9 s)", "done"]


def test_long_lines_are_not_broken(scene: Scene) -> None:
    with scene.view as view:
        view.say("x" * 200)
    assert messages(scene.out) == ["x" * 200]


def test_steps_are_shown_with_figures_but_not_all(scene: Scene) -> None:
    for step in range(1, 25):
        scene.view.step(metrics(step), total_steps=24)
        scene.wait(0.5)
    assert messages(scene.out) == [  # one in 3 s, and the last one
        f"step {step}/24  t 0.412  loss 2.500  kl 1.250  {2 * (24 - step)} s left" for step in (7, 13, 19, 24)
    ]


def test_the_last_step_is_always_shown(scene: Scene) -> None:
    with scene.view as view:
        view.step(metrics(2), total_steps=3)
        view.step(metrics(3), total_steps=3)
    assert messages(scene.out) == ["step 3/3  t 0.412  loss 2.500  kl 1.250  0 s left"]


def test_the_time_left_and_slow_steps(scene: Scene) -> None:
    scene.wait(3.5)
    scene.view.step(metrics(1), total_steps=3)
    scene.wait(6)
    scene.view.step(metrics(3), total_steps=3)
    scene.wait(6)
    assert messages(scene.out) == [
        "step 1/3  t 0.412  loss 2.500  kl 1.250  4 s left",
        "... still at: step 2 of 3 (4 s)",
        "step 3/3  t 0.412  loss 2.500  kl 1.250  0 s left",
        "... still at: step 3 of 3 (4 s)",  # there is no step 4
    ]


def test_waiting_for_something_is_a_line_only_if_it_takes_long(scene: Scene) -> None:
    scene.view.wait_for("replica 1 of 2")
    scene.wait(3.5)
    assert messages(scene.out) == []
    scene.wait(0.5)
    assert messages(scene.out) == ["... still at: replica 1 of 2 (4 s)"]


def say_often(view: ProgressView) -> None:
    for _ in range(50):
        view.say("word " * 29 + "word")


def test_threads_do_not_mix_lines(scene: Scene) -> None:
    with scene.view as view:
        threads = [threading.Thread(target=say_often, args=[view]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN_S)
    assert messages(scene.out) == ["word " * 29 + "word"] * 200


def terminal(use: Callable[[ProgressView], None]) -> str:
    out = io.StringIO()
    console = Console(force_terminal=True, file=out, width=160, color_system=None)
    with ProgressView(console, clock=lambda: 1000.0) as view:
        use(view)
        assert view._bar is not None
        view._bar.refresh()
    return out.getvalue()


def test_terminal_shows_a_bar_with_count_and_figures() -> None:
    def use(view: ProgressView) -> None:
        view.say("checking models and data")
        view.step(metrics(7), total_steps=20)

    shown = terminal(use)
    assert re.search(r"\[ *0\.0s\] checking models and data", shown)
    assert "training" in shown and "7/20" in shown
    assert "t 0.412  loss 2.500  kl 1.250  26 s left" in shown
    assert "━" in shown


def test_terminal_shows_brackets_as_they_are() -> None:
    """A path in brackets must neither vanish as markup nor break the drawing."""
    shown = terminal(lambda view: view.say("cutting layers [0, 4] of [/models/teacher] [red]"))
    assert shown.count("cutting layers [0, 4] of [/models/teacher] [red]") >= 2  # the line and the bar's text


def test_terminal_says_what_happens_after_the_last_step() -> None:
    def use(view: ProgressView) -> None:
        view.step(metrics(20), total_steps=20)
        view.say("saving the model")

    live = re.findall(r"(\S) saving the model (\S+)", terminal(use))
    assert any(spinner in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" and "━" in bar for spinner, bar in live)


def test_terminal_shows_what_is_being_waited_for_in_the_bar_only() -> None:
    shown = terminal(lambda view: view.wait_for("replica [1/2]"))
    assert "replica [1/2]" in shown and "s] replica" not in shown


def test_terminal_has_no_silence_lines() -> None:
    for thread in fillers():  # of views before
        thread.join(WITHIN_S)

    def use(view: ProgressView) -> None:
        assert not fillers()

    assert "still at" not in terminal(use)
