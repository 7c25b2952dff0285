"""The run directory as a driver finds it: new, taken up again, in use, or of another run."""

import errno
import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.control.status import read_status
from taid_ray.errors import CheckpointError, ClusterError, ConfigError, RunError
from taid_ray.report.history import read_history
from taid_ray.run.directory import (
    RunManifest,
    inspect_run_dir,
    moved_data,
    on_its_day,
    read_summary,
    run_directory,
    scratch_directory,
)
from taid_ray.run.layout import METRICS_FILE, SUMMARY_FILE
from tests.support.paths import ROOT

TREE: dict[str, Any] = {
    "teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}, "train": {"steps": 9}
}  # fmt: skip


def config(directory: Path, *overrides: str) -> DistillConfig:
    return with_absolute_paths(build_config(TREE, overrides, {"out": str(directory)}))


def begin(found: DistillConfig) -> str:
    """Leaves a run that has made a step; its id."""
    with run_directory(found) as run:
        run.begin_attempt(2, "session_1/01000000")
        (found.run_dir / METRICS_FILE).write_text("{}\n")
        return run.id


def test_an_unfinished_run_is_taken_up_again_under_its_id(tmp_path: Path) -> None:
    found = config(tmp_path / "run")
    assert inspect_run_dir(found) == "new"
    first = begin(found)
    assert inspect_run_dir(found) == "unfinished"
    with run_directory(found) as run:
        assert (run.id, run.attempts) == (first, 1)
        assert run.checkpoints == str(tmp_path / "run" / "checkpoints")
        run.begin_attempt(1, "session_2/01000000")
        assert run.jobs == {"session_1/01000000", "session_2/01000000"}
    attempts = json.loads((found.run_dir / "run.json").read_text())["attempts"]
    assert [attempt["workers"] for attempt in attempts] == [2, 1]
    assert [attempt["steps_before"] for attempt in attempts] == [0, 1]
    assert {path.name for path in found.run_dir.iterdir()} == {"config.yaml", "run.json", METRICS_FILE}


@pytest.mark.parametrize("memory_gib", [0.0, 8.0])
def test_a_run_that_was_begun_when_the_cache_had_memory_is_taken_up_again(tmp_path: Path, memory_gib: float) -> None:
    found = config(tmp_path / "run", "cache.directory=/somewhere")
    begin(found)
    path = found.run_dir / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["cache"]["memory_gib"] = memory_gib
    path.write_text(yaml.safe_dump(tree))
    (found.run_dir / METRICS_FILE).write_text("")
    assert inspect_run_dir(found) == "unfinished"
    assert read_status(found.run_dir)


@pytest.mark.parametrize(("began", "now"), [("sdpa", "auto"), ("auto", "sdpa")])
def test_a_run_that_was_begun_before_attention_could_be_auto_is_taken_up_again(
    tmp_path: Path, began: str, now: str
) -> None:
    """Its config.yaml says sdpa, which was the default."""
    begin(config(tmp_path / "run", f"teacher.attention={began}", f"student.attention={began}"))
    assert inspect_run_dir(config(tmp_path / "run", f"teacher.attention={now}")) == "unfinished"
    with pytest.raises(ConfigError, match=r"student\.attention \(was"):
        inspect_run_dir(config(tmp_path / "run", "student.attention=eager"))


def test_the_day_on_which_a_run_began_is_kept(tmp_path: Path) -> None:
    found = config(tmp_path / "run")
    left = tmp_path / "run" / "config.yaml"
    today = on_its_day(found, left)
    assert today.data.date == date.today().isoformat()
    begin(on_its_day(config(tmp_path / "run", 'data.date="2026-01-02"'), left))
    assert inspect_run_dir(found) == "unfinished"
    assert on_its_day(found, left).data.date == "2026-01-02"
    with pytest.raises(ConfigError, match=r'data\.date \(was "2026-01-02", now "'):
        inspect_run_dir(today)
    tree = yaml.safe_load(left.read_text())
    del tree["data"]["date"], tree["data"]["turns"]  # a run of an older version
    left.write_text(yaml.safe_dump(tree))
    assert inspect_run_dir(found) == inspect_run_dir(today) == "unfinished"
    assert on_its_day(found, left) == today


def test_a_finished_run_is_known(tmp_path: Path) -> None:
    found = config(tmp_path / "run")
    begin(found)
    (found.run_dir / SUMMARY_FILE).write_text('{"steps": 9}')
    assert inspect_run_dir(found) == "finished" and read_summary(found.run_dir) == {"steps": 9}


def test_keys_that_may_change_on_resume_may(tmp_path: Path) -> None:
    begin(config(tmp_path / "run"))
    free = [
        "teacher.replicas=3", "teacher.window=9", "student.workers=4", "student.zero_stage=3", "train.micro_batch_size=1",
        "student.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}", "checkpoint.keep=7", "name=other",
    ]  # fmt: skip
    assert inspect_run_dir(config(tmp_path / "run", *free)) == "unfinished"


def test_data_may_lie_elsewhere_until_a_run_is_finished(tmp_path: Path) -> None:
    """Whether they are the same is asked by `driver.same_data`."""
    begin(config(tmp_path / "run"))
    moved = config(tmp_path / "run", "data.train=elsewhere")
    assert inspect_run_dir(moved) == "unfinished"
    assert [line.partition(" ")[0] for line in moved_data(moved)] == ["data.train"]
    (moved.run_dir / SUMMARY_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r'data\.train \(was .*, now "elsewhere"\)'):
        inspect_run_dir(moved)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.learning_rate=0.5", "train.learning_rate (was 0.0001, now 0.5)"),
        ("train.steps=10", "train.steps (was 9, now 10)"),
        ("teacher.model=u", 'teacher.model (was "t", now "u")'),
        ("teacher.payload=hidden_int8", "teacher.payload"),
        ("student.lora={rank: 2}", "student.lora.rank (was null, now 2)"),
        ("schedule.alpha=0.1", "schedule.alpha"),
        ("checkpoint.storage=/elsewhere", "checkpoint.storage"),
    ],
)
def test_what_the_trajectory_depends_on_may_not_change(override: str, named: str, tmp_path: Path) -> None:
    begin(config(tmp_path / "run"))
    with pytest.raises(ConfigError) as refused:
        inspect_run_dir(config(tmp_path / "run", override))
    assert named in str(refused.value) and "--out" in str(refused.value)


def test_a_new_directory_goes_again_if_nothing_was_trained_and_an_old_one_stays(tmp_path: Path) -> None:
    found = config(tmp_path / "run")
    with pytest.raises(ClusterError), run_directory(found):
        raise ClusterError("no room")
    assert not found.run_dir.exists()
    begin(found)
    for error in (ClusterError("no room"), KeyboardInterrupt(), SystemExit(143)):
        with pytest.raises(type(error)), run_directory(found):
            raise error
    assert inspect_run_dir(found) == "unfinished"


@pytest.mark.parametrize("metrics", [None, ""])
def test_a_run_of_before_is_never_removed(tmp_path: Path, metrics: str | None) -> None:
    """Even if its metrics are lost: there are checkpoints, or the id that finds them."""
    found = config(tmp_path / "run")
    begin(found)
    (found.run_dir / "metrics.jsonl").unlink()
    if metrics is not None:
        (found.run_dir / "metrics.jsonl").write_text(metrics)
    (found.run_dir / "checkpoints").mkdir()
    for error in (CheckpointError("bring it back"), KeyboardInterrupt()):
        with pytest.raises(type(error)), run_directory(found):
            raise error
    assert (found.run_dir / "checkpoints").is_dir() and (found.run_dir / "run.json").exists()


def test_one_driver_at_a_time_whose_lock_ends_with_it(tmp_path: Path) -> None:
    found = config(tmp_path / "run")
    begin(found)
    script = f"""
import sys
from pathlib import Path
from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import build_config
from taid_ray.run.directory import run_directory
with run_directory(with_absolute_paths(build_config({TREE!r}, [], {{"out": {str(found.run_dir)!r}}}))):
    print("in", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with pytest.raises(ConfigError, match="another process is at work"), run_directory(found):
            pass
        other.kill()
    with run_directory(found) as run:
        assert run.attempts == 1


def test_files_that_cannot_be_removed_do_not_make_a_finished_run_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a file that some process has open under another name; the next driver removes it."""
    found = config(tmp_path / "run")

    def busy(*given: Any, **options: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with run_directory(found), scratch_directory(found.run_dir) as scratch:
        (Path(scratch) / ".nfs0001").touch()
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", busy)
            patch.setattr(os, "rmdir", busy)
            with scratch_directory(found.run_dir) as other:
                (Path(other) / ".nfs0002").touch()
        assert Path(other).exists()
    assert not Path(scratch).exists()
    begin(found)
    assert not Path(other).exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"id": 3, "attempts": []}', '{"id": "x"}', '{"id": "x", "attempts": [{}]}']
)
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    """To whoever reads it: the next driver, `status`, `report`."""
    found = config(tmp_path / "run")
    begin(found)
    (found.run_dir / "run.json").write_text(content)
    for read in (lambda: RunManifest(found), lambda: read_status(found.run_dir), lambda: read_history(found.run_dir)):
        with pytest.raises(RunError, match=r"run\.json is damaged"):
            read()


def test_a_run_that_takes_its_directory_away_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether there is a run and the look what it is."""
    found = config(tmp_path / "run")
    begin(found)
    read_text = Path.read_text

    def vanishes(self: Path, *given: Any, **options: Any) -> str:
        if self.name == "run.json":
            shutil.rmtree(found.run_dir)
        return read_text(self, *given, **options)

    monkeypatch.setattr(Path, "read_text", vanishes)
    with pytest.raises(ConfigError, match="there is no such directory"):
        read_status(found.run_dir)
