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

LINE = re.compile(r"\[ *(\d+\.\d)s\] (.*)")


class Lines(io.StringIO):
    """Remembers when each line was written."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, text: str) -> int:
        self.times += [time.monotonic()] * text.count("\n")
        return super().write(text)


def plain() -> tuple[ProgressView, Lines]:
    out = Lines()
    return ProgressView(Console(file=out, width=60)), out


def messages(out: io.StringIO) -> list[str]:
    found = [LINE.fullmatch(line) for line in out.getvalue().splitlines()]
    assert all(found), out.getvalue()
    return [match[2] for match in found if match]


def metrics(step: int, **others: Any) -> dict[str, Any]:
    return {"step": step, "t": 0.41234, "loss": 2.5, "kl": 1.25, "step_s": 2.0} | others


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything ten times as fast."""
    for name in ("SILENCE_S", "FIGURES_S", "TICK_S"):
        monkeypatch.setattr(progress, name, getattr(progress, name) / 10)


def test_the_promise_of_five_seconds_is_kept() -> None:
    assert progress.SILENCE_S + progress.TICK_S < 5 and progress.FIGURES_S < progress.SILENCE_S


def test_never_silent_and_says_what_it_waits_for(quick: None) -> None:
    view, out = plain()
    start = time.monotonic()
    with view:
        time.sleep(0.6)
        view.say("loading the [teacher] from [/models]")
        time.sleep(1.2)
        end = time.monotonic()
    moments = [start, *out.times, end]
    assert max(b - a for a, b in pairwise(moments)) < 0.9  # 0.45 on an idle machine
    said = messages(out)
    position = said.index("loading the [teacher] from [/models]")
    assert said[:position] and all(line.startswith("... still at: starting (") for line in said[:position])
    assert len(said) > position + 1
    assert all(line.startswith("... still at: loading the [teacher] from [/models] (") for line in said[position + 1 :])


def test_long_lines_are_not_broken() -> None:
    view, out = plain()
    with view:
        view.say("x" * 200)
    assert messages(out) == ["x" * 200]


def test_steps_are_shown_with_figures_but_not_all(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENCE_S", 1000.0)
    view, out = plain()
    with view:
        for step in range(1, 25):
            view.step(metrics(step), total_steps=24)
            time.sleep(0.05)
    said = messages(out)
    assert 3 <= len(said) <= 12  # 1.2 s of steps, one line in 0.3 s
    assert all(re.fullmatch(r"step \d+/24  t 0\.412  loss 2\.500  kl 1\.250  \d+ s left", line) for line in said)
    assert said[-1] == "step 24/24  t 0.412  loss 2.500  kl 1.250  0 s left"


def test_the_last_step_is_always_shown() -> None:
    view, out = plain()
    with view:
        view.step(metrics(2), total_steps=3)
        view.step(metrics(3), total_steps=3)
    assert messages(out) == ["step 3/3  t 0.412  loss 2.500  kl 1.250  0 s left"]


def test_the_time_left_and_slow_steps(quick: None) -> None:
    view, out = plain()
    with view:
        time.sleep(0.35)
        view.step(metrics(1), total_steps=3)
        time.sleep(0.6)
        view.step(metrics(3), total_steps=3)
        time.sleep(0.6)
    said = messages(out)
    assert said[0].startswith("step 1/3") and said[0].endswith("4 s left")
    assert said[1].startswith("... still at: step 2 of 3 (")
    assert said[-1].startswith("... still at: step 3 of 3 (")  # there is no step 4


def test_waiting_for_something_is_a_line_only_if_it_takes_long(quick: None) -> None:
    view, out = plain()
    with view:
        view.wait_for("replica 1 of 2")
        time.sleep(0.2)
        assert messages(out) == []
        time.sleep(0.5)
    assert messages(out)[0].startswith("... still at: replica 1 of 2 (")


def test_nothing_is_written_after_the_end(quick: None) -> None:
    view, out = plain()
    with view:
        view.say("done")
    time.sleep(0.7)
    assert messages(out) == ["done"]


def say_often(view: ProgressView) -> None:
    for _ in range(50):
        view.say("word " * 29 + "word")


def test_threads_do_not_mix_lines() -> None:
    view, out = plain()
    with view:
        threads = [threading.Thread(target=say_often, args=[view]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert messages(out) == ["word " * 29 + "word"] * 200


def terminal(use: Callable[[ProgressView], None]) -> str:
    out = io.StringIO()
    with ProgressView(Console(force_terminal=True, file=out, width=160, color_system=None)) as view:
        use(view)
        assert view._bar is not None
        view._bar.refresh()
    return out.getvalue()


def test_terminal_shows_a_bar_with_count_and_figures() -> None:
    def use(view: ProgressView) -> None:
        view.say("checking models and data")
        view.step(metrics(7), total_steps=20)

    shown = terminal(use)
    assert re.search(r"\[ *0\.\ds\] checking models and data", shown)
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


def test_terminal_has_no_silence_lines(quick: None) -> None:
    assert "still at" not in terminal(lambda view: time.sleep(0.7))
