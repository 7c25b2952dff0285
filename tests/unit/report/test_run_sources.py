"""The sources of a mixture in a run's report."""

from pathlib import Path

import pytest

from taid_ray.report.history import read_history
from taid_ray.report.run_page import write_run_report
from taid_ray.report.run_sources import source_curves, source_heading, source_rows
from tests.support.report_files import (
    STEPS,
    with_sources,
    write_run,
    write_run_without_teacher,
)


def test_figures_of_each_source(tmp_path: Path) -> None:
    history = read_history(with_sources(write_run(tmp_path / "run")))
    assert history.sources["code"]["tokens"].tolist() == [25.0, 0.0] * (STEPS // 2)
    wiki, code = source_rows(history)
    last = [1 + 1 / step for step in range(STEPS - 3, STEPS + 1)]  # a tenth of the run
    mean, odd = sum(last) / 4, (last[0] + last[2]) / 2
    assert wiki == ("wiki", "75.0%", "3,000", f"{mean + 1.5:.4f}", f"{mean:.4f}", "2.5000", "1.0000")
    assert code == ("code", "12.5%", "500", f"{odd + 2.5:.4f}", f"{odd / 2:.4f}", "3.0000", "1.0000")


def test_the_picture_has_a_curve_for_each_source(tmp_path: Path) -> None:
    training, validation = source_curves(read_history(with_sources(write_run(tmp_path / "run")))).axes
    assert [line.get_label() for line in training.get_lines()] == ["wiki", "code"]
    assert [len(line.get_xdata()) for line in training.get_lines()] == [STEPS, STEPS // 2]  # type: ignore[arg-type]
    assert [line.get_label() for line in validation.get_lines()] == [
        "wiki",
        "teacher on wiki",
        "code",
        "teacher on code",
    ]


def test_without_a_teacher_sources_have_no_figures_of_one(tmp_path: Path) -> None:
    run = with_sources(write_run_without_teacher(tmp_path / "run"))
    history = read_history(run)
    assert source_heading(history) == ["source", "", "loss tokens", "loss at the end", "cross-entropy"]
    assert [len(row) for row in source_rows(history)] == [5, 5]
    assert [line.get_label() for line in source_curves(history).axes[1].get_lines()] == ["wiki", "code"]
    write_run_report(run)


@pytest.mark.parametrize("mixture", [False, True])
def test_only_the_report_of_a_mixture_shows_sources(tmp_path: Path, mixture: bool) -> None:
    run = write_run(tmp_path / "run")
    write_run_report(with_sources(run) if mixture else run)
    page = (run / "report.html").read_text()
    assert ("Loss of each source" in page) == ("<h2>Sources</h2>" in page) == mixture
    assert (run / "report" / "sources.png").exists() == mixture
