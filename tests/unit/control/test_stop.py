"""Stopping a Ray job: a cluster that does not answer for a moment, and a driver that is killed instead of saving."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from taid_ray.control import jobs
from taid_ray.control import stop as stopping
from taid_ray.control.stop import stop
from taid_ray.errors import ClusterError
from taid_ray.run.layout import ENDED_FILE, LIVE_FILE, SUMMARY_FILE
from tests.support.run_files import ELSEWHERE, ended, run_dir, search_dir

JOB = replace(ELSEWHERE, submission="taid-RUN")


class Job:
    """The Jobs API. answers: one for each question how the job is, the last one for ever; errors are raised."""

    def __init__(self, *answers: JobStatus | Exception, on_stop: Callable[[], Any] = lambda: None):
        self._answers, self._on_stop = list(answers), on_stop

    def get_address(self) -> str:
        return "http://head:8265"

    def stop_job(self, job: str) -> None:
        self._on_stop()

    def get_job_status(self, job: str) -> JobStatus:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def stopped(run: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `stop` says."""
    said: list[str] = []
    monkeypatch.setattr(jobs, "connect", lambda address: job)
    monkeypatch.setattr(stopping, "POLL_S", 0.01)
    stop(run, None, said.append)
    return said


def test_a_moment_without_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_dir(tmp_path, steps=4, live=JOB)

    def end() -> None:
        (run / LIVE_FILE).unlink()
        (run / ENDED_FILE).write_text(json.dumps(ended("stopped")))

    cut = ConnectionError("cut off")
    said = stopped(run, Job(cut, JobStatus.RUNNING, RuntimeError("503"), JobStatus.STOPPED, on_stop=end), monkeypatch)
    assert [line for line in said if "was lost" in line] == [
        f"the connection to http://head:8265 was lost ({why}); trying again" for why in ("cut off", "503")
    ]
    assert said[-1] == "stopped after step 4 of 50; the same command goes on with it"


def test_no_answer_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 50))
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(ClusterError, match=r"has not answered for 120 s \(cut off\); the job taid-RUN may go on there"):
        stopped(run_dir(tmp_path, steps=4, live=JOB), Job(ConnectionError("cut off")), monkeypatch)


def test_a_driver_that_died_instead_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from another host, live.json still looks alive."""
    run = run_dir(tmp_path / "a", steps=4, live=JOB)
    with pytest.raises(
        ClusterError, match=rf"died without saving.*no whole checkpoint is seen in {re.escape(str(run))}/checkpoints"
    ):
        stopped(run, Job(JobStatus.STOPPED), monkeypatch)
    checkpoint = run / "checkpoints" / f"step-{3:09d}-{1:020d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank-00000.json").write_text(json.dumps({"world_size": 1}))
    with pytest.raises(ClusterError, match=r"newest whole checkpoint is that of step 3, of 4 steps\. The same command"):
        stopped(run, Job(JobStatus.STOPPED), monkeypatch)
    with pytest.raises(ClusterError, match="its trials have the checkpoints they had"):
        stopped(search_dir(tmp_path / "S", "running", live=JOB), Job(JobStatus.FAILED), monkeypatch)


def test_a_driver_that_died_after_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_dir(tmp_path, steps=40, live=JOB)
    job = Job(JobStatus.STOPPED, on_stop=lambda: (run / SUMMARY_FILE).write_text('{"steps": 40}'))
    assert stopped(run, job, monkeypatch)[-1] == "finished after step 40 of 40"
