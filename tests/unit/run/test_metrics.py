"""metrics.jsonl: whole lines at once, and errors that name the file and the step."""

from pathlib import Path

import pytest

from taid_ray.errors import RunError
from taid_ray.files import read_lines
from taid_ray.run.metrics import StepMetrics, metrics_log, validation_log


def metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step, epoch=0, t=0.4 + step / 100, momentum=0.0, loss=3.0 / step, kl=1.0 / step, entropy_pt=2.0 / step, sft=0.0,
        floor_active=False, lr=1e-3, grad_norm=0.5, tokens=100, tokens_per_s=50.0, step_s=2.0, teacher_wait_s=0.0,
        data_s=0.1, forward_s=0.4, loss_s=0.5, backward_s=0.8, optimizer_s=0.1, schedule_wait_s=0.0, teacher_compute_s=0.9,
        payload_bytes=6400, samples_seen=step * 4,
    )  # fmt: skip


def test_metrics_lines_are_complete_at_once_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = metrics_log(path, 0)
    for step in (1, 2):
        log.write(metrics(step).line())
        assert [line["step"] for line in read_lines(path)] == list(range(1, step + 1))  # before the next step
    log.close()
    again = metrics_log(path, 2)
    again.write(metrics(3).line())
    again.close()
    lines = read_lines(path)
    assert [line["t"] for line in lines] == [metrics(step).t for step in (1, 2, 3)]
    documented = "step epoch t momentum loss kl entropy_pt floor_active lr grad_norm tokens tokens_per_s step_s"
    times = "data_s teacher_wait_s forward_s loss_s backward_s optimizer_s schedule_wait_s teacher_compute_s"
    assert set(lines[0]) >= set(f"{documented} {times} payload_bytes samples_seen".split())


def test_a_full_disk_is_told_with_the_step(tmp_path: Path) -> None:
    log = metrics_log(tmp_path / "metrics.jsonl", 0)
    log.close()
    log._file = Path("/dev/full").open("w")  # noqa: SIM115  # the log closes it
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written after step 1: .*No space left"):
        log.write(metrics(1).line())
    log.close()  # whose own attempt to write the line must not hide the error


def test_metrics_that_do_not_reach_the_checkpoint_are_damaged(tmp_path: Path) -> None:
    metrics_log(tmp_path / "metrics.jsonl", 0).close()
    with pytest.raises(RunError, match="lacks a line of step 2 or before, and the newest checkpoint is of step 2"):
        metrics_log(tmp_path / "metrics.jsonl", 2)


def test_a_restart_keeps_the_first_lines_in_a_new_file_and_parses_the_last_of_them(tmp_path: Path) -> None:
    """A week has a million lines, and parsing them all would hold every restart up."""
    path = tmp_path / "metrics.jsonl"
    kept = [b"not looked at\n", b'{"step": 2}\n']
    path.write_bytes(b"".join([*kept, b'{"step": 3}\n']))
    with path.open("rb") as old:
        metrics_log(path, 2).close()
        assert path.read_bytes() == b"".join(kept)
        assert old.read().endswith(b'{"step": 3}\n'), "who still writes to the old file harms nobody"
    path.write_bytes(b'{"step": 1}\n{"step": 3}\n')
    with pytest.raises(RunError, match="lacks a line of step 2 or before"):
        metrics_log(path, 2)
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    with pytest.raises(RunError, match="lacks a line of step 2 or before"):
        metrics_log(path, 2)


def test_validations_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    log = validation_log(path, [{"step": 0}])
    file = path.stat().st_ino
    log.write({"step": 10})
    log.close()
    assert [line["step"] for line in read_lines(path)] == [0, 10] and path.stat().st_ino == file


def test_no_room_for_the_kept_lines_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    path.with_suffix(".tmp").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written .*; make room there"):
        metrics_log(path, 1)
