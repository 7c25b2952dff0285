"""Checkpoints elsewhere than in the run directory: on a disk that is full for a while, and by a URI."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disk import fill, small_disk
from tests.support.harness import NewRun, Run, check_same_result, small_config


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """With room for three checkpoints: two are kept while one is written."""
    with small_disk(tmp_path / "disk", 8) as path:
        yield path


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_disk_that_is_full_for_a_while(disk: Path, new_run: NewRun, baseline: Run) -> None:
    """The run says so and goes on; the next checkpoint is there, and the result is what it would have been."""
    # Many steps, to fill the disk in before the first checkpoint, and to make room again before the second.
    run = new_run(small_config("full", checkpoint={"every_steps": 20, "storage": str(disk)}))
    run.start()
    run.wait_for_step(2)
    ballast = fill(disk)
    run.until(lambda: "could not be written, training goes on" in run.log, "a word of the full disk")
    ballast.unlink()
    run.wait_for_end()
    check_same_result(run, baseline)
    assert run.attempts == 1
    text = " ".join(run.log.split())
    assert "the checkpoint of step 20 could not be written" in text and "No space left on device" in text
    assert "checkpoint of step 40 saved" in text
    kept = {path.name.split("-")[1] for path in (disk / run.id).iterdir()}
    assert "000000020" not in kept and "000000040" in kept
    assert not (run.dir / "checkpoints").exists()
    run.check_nothing_left()


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_storage_by_uri(tmp_path: Path, new_run: NewRun, baseline: Run) -> None:
    """A run that was stopped goes on from there."""
    storage = tmp_path / "some bucket"
    run = new_run(small_config("uri", checkpoint={"every_steps": 4, "storage": f"file://{storage}"}))
    run.start()
    run.wait_for_step(6)
    run.signal_driver(signal.SIGTERM)
    run.wait_for_end(143)
    stopped = run.step
    names = sorted(path.name for path in (storage / run.id).iterdir())
    assert names and names[-1].startswith(f"step-{stopped:09d}-")
    run.start()
    run.wait_for_end()
    assert f"going on after step {stopped}, from the checkpoint" in " ".join(run.log.split())
    check_same_result(run, baseline)
    assert not (run.dir / "checkpoints").exists()
    run.check_nothing_left()
