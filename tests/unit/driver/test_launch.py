"""What the driver leaves once a run is finished."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.driver import launch
from taid_ray.report import run_page
from tests.support.html_page import Page
from tests.support.report_files import SUMMARY, write_run


def finished(directory: Path) -> DistillConfig:
    """The configuration of a finished run, of which only the report and the model card are missing."""
    run = write_run(directory / "run", out=str(directory / "run"))
    (run / "model").mkdir()
    return build_config(yaml.safe_load((run / "config.yaml").read_text()))


def test_a_finished_run_gets_its_card_and_its_report(tmp_path: Path) -> None:
    config, told = finished(tmp_path), []
    launch.leave_report(config, SUMMARY, told.append)
    assert not told
    page = Page((config.run_dir / "report.html").read_text(encoding="utf-8"))
    assert page.text["p"][0].startswith("Finished")
    assert "# stories" in (config.run_dir / "model" / "README.md").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_drawn_is_told_and_the_run_stays_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, told = finished(tmp_path), []
    (config.run_dir / "metrics.jsonl").write_text("nonsense\n")
    monkeypatch.setattr(launch, "write_model_card", lambda *arguments: 1 / 0)
    launch.leave_report(config, SUMMARY, told.append)
    assert len(told) == 2 and all(line.startswith("warning: the run is finished, but ") for line in told)
    assert "model/README.md could not be written (ZeroDivisionError: " in told[0]
    assert "report.html could not be written (RunError: " in told[1] and "metrics.jsonl is damaged" in told[1]


def test_the_same_command_draws_what_is_missing_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run whose driver died between the summary and the report."""
    config, drawn = finished(tmp_path), []
    write = run_page.write_run_report
    monkeypatch.setattr(run_page, "write_run_report", lambda path: drawn.append(path) or write(path))
    for _ in range(2):
        result = launch.run_distillation(config, launch.RunContext(Console(quiet=True)))
        assert result.summary == json.loads((config.run_dir / "summary.json").read_text())
    assert drawn == [config.run_dir] and (config.run_dir / "report.html").exists()
