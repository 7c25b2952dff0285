import base64
import json
import re
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from matplotlib.figure import Figure
from typer.testing import CliRunner

from taid_ray.cli.report import report
from taid_ray.errors import ConfigError, RunError
from taid_ray.report.format import shown_amount, shown_seconds
from taid_ray.report.history import COLUMNS, PHASE_COLUMNS, History, read_history
from taid_ray.report.run_notes import run_notes
from taid_ray.report.run_page import key_figures, time_rows, validation_rows, write_run_report
from taid_ray.report.run_plots import Bins, loss_curves, optimizer, step_time, t_curve, throughput
from taid_ray.run.metrics import PHASES, StepMetrics
from tests.support.html_page import Page
from tests.support.report_files import (
    STEPS,
    SUMMARY,
    TREE,
    metric_lines,
    validation_lines,
    write_lines,
    write_run,
    write_run_without_teacher,
)


def made(directory: Path, *args: Any, **kwargs: Any) -> History:
    return read_history(write_run(directory / "run", *args, **kwargs))


def drawn(figure: Figure) -> dict[str, list[float]]:
    """The points of each curve by its name."""
    return {str(line.get_label()): list(line.get_ydata()) for axes in figure.axes for line in axes.get_lines()}  # type: ignore[arg-type]


def test_columns_are_those_of_the_metrics_and_the_phases_those_of_the_loop() -> None:
    from taid_ray.run.metrics import PHASES as LOOP

    assert set(COLUMNS) <= {field.name for field in fields(StepMetrics)} and len(set(COLUMNS)) == len(COLUMNS)
    assert set(PHASES) == {*LOOP, "teacher_wait"}


def test_history_of_a_finished_run(tmp_path: Path) -> None:
    history = made(tmp_path)
    assert (history.steps, history.total_steps, history.id) == (STEPS, STEPS, "stories-1234")
    lines = metric_lines(TREE, STEPS, STEPS)
    for name in COLUMNS:
        assert list(history[name]) == [float(line[name]) for line in lines], name
    assert len(history.validations) == 5 and len(history.attempts) == 2


@pytest.mark.parametrize("mode", ["linear", "adaptive", "normalised", "exponential"])
def test_the_floor_is_that_of_the_schedule(mode: str, tmp_path: Path) -> None:
    history = made(tmp_path, schedule={"mode": mode, "t_start": 0.3, "t_end": 0.9, "alpha": 0.02})
    floor, t, on_it = history.floor(), history["t"], history["floor_active"] > 0
    assert floor is not None and on_it.any()
    np.testing.assert_allclose(t[on_it], floor[on_it], atol=1e-12)
    assert (t >= floor - 1e-12).all()


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "t": 0.')
    history = read_history(run)
    assert (history.steps, history.total_steps) == (20, STEPS)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("metrics.jsonl", '{"step": 1}\n', "line 1 has no 'epoch'"),
        ("metrics.jsonl", "[]\n", "line 1 is not that of step 1"),
        ("metrics.jsonl", "nonsense\n", "line 1 is not that of step 1"),
        ("validation.jsonl", "{\n", "not JSON"),
        ("run.json", "{", "not JSON"),
        ("run.json", "{}", "id and attempts"),
        ("summary.json", "{", "not JSON"),
    ],
)
def test_damaged_files_are_named(name: str, text: str, found: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(RunError, match=found) as caught:
        read_history(run)
    assert str(run / name) in str(caught.value)


def test_a_gap_is_damage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(RunError, match="line 6 is not that of step 6"):
        read_history(run)


def test_what_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.yaml").write_text("{}")
    (tmp_path / "file").write_text("")
    new = write_run(tmp_path / "new", 0, finished=False)
    for name, found in {
        "nowhere": "there is no such directory",
        "empty": "holds no config.yaml",
        "search": "directory of a search.*trials/NAME",
        "file": "not a run directory",
        "new": "no step yet",
    }.items():
        with pytest.raises(ConfigError, match=found):
            write_run_report(tmp_path / name)
    (new / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="no step yet"):
        write_run_report(new)
    assert not list(tmp_path.rglob("report*")) and not (tmp_path / "nowhere").exists()


def test_the_page_holds_everything(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for _ in range(2):  # a second time over the first
        write_run_report(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    pictures = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources]
    names = ("t.png", "loss.png", "step_time.png", "throughput.png", "optimizer.png")
    assert pictures == [(run / "report" / name).read_bytes() for name in names]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 10_000 for picture in pictures)
    assert "<script" not in text and "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "color-scheme: light dark" in text and "a<b" in page.text["td"]
    assert page.text["h1"] == ["Run stories"] and page.text["p"][0].startswith("Finished: 40 of 40 steps. KL to the")
    assert page.text["li"] == run_notes(read_history(run)) and (run / "config.yaml").exists()
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name in before} == before
    assert {path.name for path in run.iterdir()} == {*before, "report", "report.html"}
    assert sorted(path.name for path in (run / "report").iterdir()) == sorted(names)


def test_a_run_with_images_tells_of_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert not any("image" in name for name, _ in key_figures(read_history(run)))
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"images": 4321, "image_bytes": 3 << 19}))
    lines = [line | {"seeing": 0.001 + line["step"]} for line in validation_lines(40)]
    write_lines(run / "validation.jsonl", lines)
    found = dict(key_figures(read_history(run)))
    assert found["images"] == "4,321, of which 1.5 MiB were sent to the teacher"
    assert found["what grey images change"] == "0.001 nats of the student at first, 40 at last"


@pytest.mark.parametrize("steps", [1, 2, 3, 11])
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.filterwarnings("error")
def test_short_runs_have_a_report(steps: int, finished: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps, finished)
    write_run_report(run)
    Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("error")
def test_odd_figures_have_a_report(tmp_path: Path) -> None:
    """An infinite gradient norm, steps without any time, and no validation yet."""
    run = write_run(tmp_path / "run", 20, finished=False)
    lines = metric_lines(TREE, 20, STEPS)
    lines[3]["grad_norm"] = float("inf")
    for line in lines:
        line |= dict.fromkeys((*PHASE_COLUMNS, "step_s"), 0.0)
    write_lines(run / "metrics.jsonl", lines)
    (run / "validation.jsonl").unlink()
    write_run_report(run)
    assert "Validation" not in (run / "report.html").read_text()


def test_pictures_show_the_figures(tmp_path: Path) -> None:
    history = made(tmp_path)
    floor = history.floor()
    assert floor is not None
    curves = (
        drawn(t_curve(history)) | drawn(loss_curves(history)) | drawn(throughput(history)) | drawn(optimizer(history))
    )
    shown: dict[str, Any] = {
        "t": history["t"],
        "linear floor": floor,
        "loss (cross-entropy form)": history["loss"],
        "entropy of the target": history["entropy_pt"],
        "KL(target || student)": history["kl"],
        "cross-entropy of the student": [line["cross_entropy"] for line in history.validations],
        "KL(teacher || student)": [line["kl"] for line in history.validations],
        "throughput": [50.0] * STEPS,
        "gradient norm": history["grad_norm"],
        "learning rate": history["lr"],
    }
    for label, expected in shown.items():
        assert curves[label] == pytest.approx(list(expected)), label
    (axes,) = step_time(history).axes
    tops = {patch.get_label(): patch.get_data().values[0] for patch in axes.patches}  # type: ignore[attr-defined]
    assert tops["forward"] == pytest.approx(0.4) and tops["wait for the teacher"] == pytest.approx(1.9)
    assert tops["other"] == pytest.approx(2.0)


def test_a_run_without_a_teacher_shows_no_figure_of_one(tmp_path: Path) -> None:
    run = write_run_without_teacher(tmp_path / "run")
    (note,) = [note for note in write_run_report(run) if "loss" in note]
    assert note == "The loss is sft, cross-entropy on the data's own tokens, which learns from no teacher."
    history = read_history(run)
    names = {name for name, _ in key_figures(history)}
    assert dict(key_figures(history))["teacher"] == "none" and "wait for the teacher" not in names
    assert [row[0] for row in validation_rows(history)] == [
        "student, first", "student, lowest cross-entropy", "student, last"
    ]  # fmt: skip
    labels = {label for draw in (loss_curves, throughput) for label in drawn(draw(history))}
    assert labels == {"cross-entropy", "cross-entropy of the student", "throughput"}
    assert not any("teacher" in name for name, *_ in time_rows(history))
    text = re.sub(r'<details>.*?</details>|src=".*?"', "", (run / "report.html").read_text(), flags=re.S)
    assert "KL" not in text and not (run / "report" / "t.png").exists()


def test_a_slow_step_does_not_flatten_the_others(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = metric_lines(TREE, STEPS, STEPS)
    lines[0] |= {"step_s": 60.0, "teacher_wait_s": 58.2}
    write_lines(run / "metrics.jsonl", lines)
    (axes,) = step_time(read_history(run)).axes
    assert axes.get_ylim()[1] < 3
    assert [text.get_text() for text in axes.texts] == ["1 higher than shown, up to 60 s at step 1"]


def test_bins() -> None:
    values = np.arange(1.0, 11)
    assert list(Bins.of(10, 10).mean(values)) == list(values) and list(Bins.of(10, 10).centres) == list(values)
    bins = Bins.of(10, 3)  # 4, 4 and 2 steps
    assert list(bins.mean(values)) == [2.5, 6.5, 9.5] and bins.size == 4
    assert list(bins.low(values)) == [1, 5, 9] and list(bins.high(values)) == [4, 8, 10]
    assert list(bins.centres) == [2.5, 6.5, 9.5] and bins.sum(values).sum() == 55
    assert (Bins.of(1, 10).size, list(Bins.of(1, 10).edges)) == (1, [0.5, 1.5])


def test_long_runs_are_thinned_out(tmp_path: Path) -> None:
    count = 30_000
    run = write_run(tmp_path / "run", 10, finished=False, train={"steps": 2 * count})
    line = metric_lines(TREE, 1, 1)[0] | {"step": 0}
    text = json.dumps(line)
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(text.replace('"step": 0,', f'"step": {step},') + "\n" for step in range(1, count + 1))
    began = time.process_time()
    history = read_history(run)
    write_run_report(run)
    assert time.process_time() - began < 30  # a few, on any machine
    assert sum(column.nbytes for column in history.columns.values()) == 8 * len(COLUMNS) * count
    assert max(map(len, drawn(loss_curves(history)).values())) <= 1000
    assert len(step_time(history).axes[0].patches[0].get_data().values) <= 200  # type: ignore[attr-defined]
    assert (run / "report.html").stat().st_size < 2_000_000


def said(directory: Path, *args: Any, **changes: Any) -> str:
    return "\n".join(run_notes(made(directory, *args, **changes)))


def test_notes_on_an_adaptive_run(tmp_path: Path) -> None:
    text = said(tmp_path)
    assert "The linear floor decided t in 6 of 38 steps (15.8%), the adaptive rule in the others" in text, text
    assert "sigmoid(m), through which the loss moves t, lay within" in text and "fixed curve" in text
    assert "t did not reach t_end = 1: the last step used 0.970" in text
    assert "inactive" not in text and "not finished" not in text


def test_notes_on_an_inactive_run(tmp_path: Path) -> None:
    text = said(tmp_path, schedule={"t_start": 0.4, "alpha": 5e-4})
    assert "inactive: alpha N (1 - t_start) / 2 = 0.006 is not above t_end - t_start = 0.6" in text
    assert "from about schedule.alpha = 0.05 on" in text
    assert "The linear floor decided t in all of 38 steps: it was a straight line." in text
    assert "sigmoid(m)" not in text
    assert "alpha is 0" in said(tmp_path / "zero", schedule={"alpha": 0.0})


def test_notes_on_other_schedules_and_losses(tmp_path: Path) -> None:
    fast = said(tmp_path / "a", schedule={"mode": "normalised", "t_end": 0.6, "t_start": 0.4, "alpha": 0.2})
    assert "t reached t_end = 0.6 in step 4 (10% of the run)" in fast, fast
    assert "The linear floor decided t in 0 of 2 steps until t was t_end (0.0%)" in fast
    linear = said(tmp_path / "b", schedule={"mode": "linear"})
    assert "schedule.mode is linear: t follows the line from 0.4 to 1" in linear
    curve = made(tmp_path / "e", schedule={"mode": "exponential", "alpha": 0.1})
    text = "\n".join(run_notes(curve))
    assert "schedule.mode is exponential: t follows its curve from 0.4 with alpha 0.1, whatever the loss does." in text
    assert "The linear floor decided t in" in text and "the exponential curve in the others" in text
    assert dict(key_figures(curve))["loss"] == "taid, schedule exponential, t 0.4 to 1, alpha 0.1"
    assert "constant: t stays 0.4" in said(tmp_path / "c", schedule={"mode": "constant"})
    other = made(tmp_path / "d", loss={"name": "reverse_kl"})
    assert "The loss is reverse_kl" in run_notes(other)[0] and "floor" not in "\n".join(run_notes(other))
    assert "divergence (reverse_kl)" in drawn(loss_curves(other))
    write_run_report(other.path)
    assert not (other.path / "report" / "t.png").exists()
    assert "How t moved" not in (other.path / "report.html").read_text()
    assert "t in the last step" not in dict(key_figures(other))


def test_notes_on_an_unfinished_run(tmp_path: Path) -> None:
    text = said(tmp_path / "a", 20, finished=False)
    assert "The run is not finished: 20 steps of 40, the last one written at 20" in text
    assert "t is 0.76" in text and "on its way to t_end = 1" in text
    open_end = made(tmp_path / "b", 20, finished=False, train={"epochs": 2})
    assert open_end.total_steps is None and open_end.floor() is None
    assert "is known once the run has ended" in "\n".join(run_notes(open_end))
    assert "linear floor" not in drawn(t_curve(open_end))


def test_notes_on_what_holds_back_and_on_restarts(tmp_path: Path) -> None:
    text = said(tmp_path / "a")
    assert (
        "with teacher.replicas = 1: teacher-bound: the student waits 10.0% of the time, 1 replica is 90% busy" in text
    )
    assert "started again once (2026-11-21 18:25:21, UTC)" in text
    local = said(tmp_path / "b", teacher={"model": "org/teacher", "mode": "local"})
    assert "After the first step the student waited 10.0% of the time for the teacher's answers." in local


def test_tables(tmp_path: Path) -> None:
    history = made(tmp_path)
    figures = dict(key_figures(history))
    assert figures["optimizer steps"] == "40 of 40" and figures["throughput"] == "50 loss tokens per second"
    assert figures["time of all steps"] == "1 min 20 s" and figures["wait for the teacher"] == "10.0% of that time"
    assert figures["received from the teacher"] == "250.0 KiB, 64 bytes per loss token"
    assert figures["teacher"] == "org/teacher, 262,080 parameters, payload hidden"
    assert figures["documents dropped"] == "3 of 1,024" and figures["workers started"] == "2 times"
    rows = time_rows(history)
    assert rows[0] == ("backward", "█" * 16, "0.8000", "40.0%") and rows[-1] == ("whole step", "", "2.0000", "")
    assert validation_rows(history)[0] == ("teacher", "", "1.5000", "4.48", "-")
    assert validation_rows(history)[3] == ("student, last", "40", "2.5000", "12.18", "1.0000")


def test_shown() -> None:
    seconds = [shown_seconds(value) for value in (42.04, 60, 725, 3600, 12_000, 187_200)]
    assert seconds == ["42.0 s", "1 min 0 s", "12 min 5 s", "1 h 0 min", "3 h 20 min", "2 d 4 h"]
    assert shown_amount(3 * 2**30, 2**20) == "3.0 GiB, 3,072 bytes per loss token"
    assert shown_amount(0, 0) == "0 bytes, 0 bytes per loss token"


def test_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    run = write_run(tmp_path / "run")
    result = CliRunner().invoke(app, [str(run)])
    assert result.exit_code == 0, result.output
    assert "note: The linear floor" in result.output and f"report: {run}/report.html" in result.output
    assert isinstance(CliRunner().invoke(app, [str(tmp_path)]).exception, ConfigError)
