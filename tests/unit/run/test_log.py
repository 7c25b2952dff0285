"""RUN/log.jsonl: everything that was said, once, in order, as JSON lines that survive a killed driver."""

import io
import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from taid_ray.driver.progress import ProgressView
from taid_ray.errors import DataError
from taid_ray.run.log import LOG_FILE, STUDENT, run_logging

KEYS = {"time", "level", "run", "step", "role", "message"}


@pytest.fixture
def view() -> ProgressView:
    return ProgressView(Console(file=io.StringIO(), width=200))


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / LOG_FILE).read_text(encoding="utf-8").splitlines()]


def shown(view: ProgressView) -> str:
    assert isinstance(view.console.file, io.StringIO)
    return view.console.file.getvalue()


def figures(step: int) -> dict[str, Any]:
    return {"step": step, "step_s": 1.0, "t": 0.5, "loss": 2.0, "kl": 1.0}


def test_what_was_said_before_the_run_had_a_directory_comes_first(tmp_path: Path, view: ProgressView) -> None:
    before = datetime.now(UTC)
    view.say("checking models and data")
    between = datetime.now(UTC)
    with run_logging(tmp_path, "run-1", view):
        assert len(lines(tmp_path)) == 1, "also if nothing follows"
        view.say("übrigens: 100 %s\nzwei Zeilen", STUDENT)
    first, second = lines(tmp_path)
    assert [first["message"], second["message"]] == ["checking models and data", "übrigens: 100 %s\nzwei Zeilen"]
    assert before.replace(microsecond=0) <= datetime.fromisoformat(first["time"]) <= between
    assert datetime.fromisoformat(second["time"]) >= datetime.fromisoformat(first["time"])
    assert [first["role"], second["role"]] == ["driver", "student"]
    assert all(set(line) == KEYS and line["run"] == "run-1" and line["level"] == "INFO" for line in (first, second))


def test_a_line_is_there_as_soon_as_it_is_said(tmp_path: Path, view: ProgressView) -> None:
    with run_logging(tmp_path, "run-1", view):
        view.say("now")
        assert [line["message"] for line in lines(tmp_path)] == ["now"]


def test_a_line_knows_the_step_after_which_it_was_said(tmp_path: Path, view: ProgressView) -> None:
    with run_logging(tmp_path, "run-1", view):
        view.step(figures(7), 100)
        view.say("a checkpoint")
    assert [(line["step"], line["message"]) for line in lines(tmp_path)] == [(7, "a checkpoint")]


def test_figures_are_logged_now_and_then_and_at_the_end(tmp_path: Path, view: ProgressView) -> None:
    """A week of steps must not fill the disk; metrics.jsonl has them all."""
    now = [0.0]
    view = ProgressView(view.console, clock=lambda: now[0])
    with run_logging(tmp_path, "run-1", view):
        for step in range(1, 131):
            now[0] = float(step)
            view.step(figures(step), 130)
    assert [line["step"] for line in lines(tmp_path)] == [60, 120, 130]
    assert "t 0.500  loss 2.000" in lines(tmp_path)[0]["message"] and lines(tmp_path)[0]["role"] == STUDENT


def test_a_resumed_run_appends_after_the_last_whole_line(tmp_path: Path, view: ProgressView) -> None:
    with run_logging(tmp_path, "run-1", view):
        view.say("one")
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"time": "2026-')  # killed here
    with run_logging(tmp_path, "run-1", view):
        view.say("two")
    assert [line["message"] for line in lines(tmp_path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("error", "level", "message", "has_trace"),
    [
        (DataError("data.train: no such file"), "ERROR", "error: data.train: no such file", False),
        (ZeroDivisionError("a bug"), "ERROR", "error: ZeroDivisionError: a bug", True),
        (KeyboardInterrupt(), "WARNING", "interrupted", False),
        (SystemExit(143), "WARNING", "interrupted", False),
    ],
)
def test_the_error_that_ended_the_run_is_the_last_line(
    tmp_path: Path, view: ProgressView, error: BaseException, level: str, message: str, has_trace: bool
) -> None:
    with pytest.raises(type(error)), run_logging(tmp_path, "run-1", view):
        view.step(figures(3), 9)
        raise error
    (line,) = lines(tmp_path)
    assert (line["level"], line["message"], line["step"]) == (level, message, 3)
    assert ("in test_the_error_that_ended" in line.get("traceback", "")) == has_trace
    assert message not in shown(view), "the command line prints it"


def test_warnings_of_the_package_reach_terminal_and_log_once(tmp_path: Path, view: ProgressView) -> None:
    logger = logging.getLogger("taid_ray.teacher.pool.lifecycle")
    with run_logging(tmp_path, "run-1", view):
        logger.warning("replicas differ in %s bits", "some")
        logger.info("nobody needs this")
    (line,) = lines(tmp_path)
    assert (line["level"], line["message"]) == ("WARNING", "warning: replicas differ in some bits")
    assert shown(view).count("replicas differ in some bits") == 1
    assert not logging.getLogger("taid_ray").handlers
