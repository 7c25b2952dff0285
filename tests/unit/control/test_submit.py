"""Submitting: what is refused before anything leaves this machine, which job is meant, and how its log and end come back."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.job_submission import JobDetails, JobStatus, JobType

from taid_ray.cli import app as cli
from taid_ray.cli import job
from taid_ray.cli.job import run_job
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.control import jobs
from taid_ray.control.job_spec import METADATA_KEY, JobSpec
from taid_ray.control.submit import (
    STOP_WAIT,
    begin,
    check_end,
    check_travels,
    entrypoint,
    job_name,
    runtime_environment,
)
from taid_ray.errors import ClusterError, ConfigError
from taid_ray.run.live import JOB_CONFIG
from tests.support.paths import ROOT

TREE: dict[str, Any] = {
    "out": "/shared/RUN",
    "teacher": {"model": "org/teacher"},
    "student": {"model": "s"},
    "data": {"train": "d"},
    "train": {"steps": 40},
}
SPEC = JobSpec("1", TREE)


def config(**values: Any) -> DistillConfig:
    return build_config(TREE, values={key.replace("__", "."): value for key, value in values.items()})


def details(number: int, status: JobStatus, **given: Any) -> JobDetails:
    identity = "taid-RUN" if number == 1 else f"taid-RUN-{number}"
    found = {"type": JobType.SUBMISSION, "submission_id": identity, "status": status, "entrypoint": "x"} | given
    return JobDetails.model_validate(found)


class Cluster:
    """The Jobs API of a cluster, and somebody who submits the same run a moment earlier."""

    def __init__(self, *jobs: JobDetails, rival: bool = False):
        self.jobs, self._rival = list(jobs), rival

    def get_address(self) -> str:
        return "http://head:8265"

    def list_jobs(self) -> list[JobDetails]:
        return list(self.jobs)

    def submit_job(self, submission_id: str, metadata: dict[str, str], **given: Any) -> None:
        number = int(submission_id.removeprefix("taid-RUN").lstrip("-") or 1)
        new = details(number, JobStatus.PENDING, metadata=metadata)
        if self._rival:
            self._rival = False
            self.jobs.append(new)
        if submission_id in [job.submission_id for job in self.jobs]:
            raise RuntimeError(f"Request failed with status code 500: {submission_id} already exists.")
        self.jobs.append(new)


def begun(cluster: Cluster, job_spec: JobSpec = SPEC) -> tuple[str, bool, list[str]]:
    said: list[str] = []
    job, late = begin(cluster, "taid-RUN", job_spec, {}, said.append)
    return job, late, said


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"out": "runs/x"}, "out: runs/x is relative, .* absolute path, on a disk that all nodes .*--out"),
        ({"out": None}, "out: missing. Name the run directory with --out"),
        ({"out": "~/x"}, "out: ~/x is relative"),
        ({"checkpoint__storage": "ckpt"}, "checkpoint.storage: ckpt is relative"),
        ({"cache__directory": "outputs"}, "cache.directory: outputs is relative"),
        ({"data__store": "encoded"}, "data.store: encoded is relative"),
        ({"data__train": "here.jsonl"}, "data.train: here.jsonl is a path on this machine, .* --working-dir"),
    ],
)
def test_paths_that_mean_nothing_there(
    values: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    with pytest.raises(ConfigError, match=told):
        check_travels(config(**values), None)


def test_paths_that_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    check_travels(config(data__train="/not/here.jsonl", checkpoint__storage="s3://bucket/x"), None)
    check_travels(config(data__train="here.jsonl", data__store="gs://bucket/x"), tmp_path)


def test_a_directory_has_one_name() -> None:
    assert job_name("/runs/x") == job_name("/runs/x/") == job_name("/runs/y/../x") != job_name("/other/x")
    found = job_name("/runs/a b/ÄÖ?#%")
    assert found.isascii() and not set(found) & set("/?#% ")


def test_the_runtime_environment(tmp_path: Path) -> None:
    assert runtime_environment(None, None) == {"env_vars": STOP_WAIT}
    path = tmp_path / "env.yaml"
    path.write_text("{pip: [a], env_vars: {RAY_JOB_STOP_WAIT_TIME_S: 900, HF_HOME: /x}}")
    found = runtime_environment(path, tmp_path)
    assert found["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "900", "HF_HOME": "/x"}
    assert (found["pip"], found["working_dir"]) == (["a"], str(tmp_path))


@pytest.mark.parametrize(
    ("text", "told"),
    [("working_dir: /x", "which is --working-dir here"), ("[a]", "no mapping"), ("{", "cannot be read")],
)
def test_a_wrong_runtime_environment(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        runtime_environment(path, None)


def test_which_job_is_meant() -> None:
    ended = [details(1, JobStatus.FAILED), details(2, JobStatus.STOPPED)]
    assert begun(Cluster())[:2] == ("taid-RUN", False)
    assert begun(Cluster(*ended))[:2] == ("taid-RUN-3", False)
    assert begun(Cluster(*ended[::-1], details(10, JobStatus.SUCCEEDED)))[:2] == ("taid-RUN-11", False)
    assert begun(Cluster(*ended, details(3, JobStatus.RUNNING)))[:2] == ("taid-RUN-3", True)
    neighbour = JobDetails(
        type=JobType.SUBMISSION, submission_id="taid-RUN-x", status=JobStatus.RUNNING, entrypoint="x"
    )
    assert begun(Cluster(neighbour))[:2] == ("taid-RUN", False)


def test_of_two_at_once_one_follows() -> None:
    cluster = Cluster(rival=True)
    assert begun(cluster) == ("taid-RUN", True, [])
    assert len(cluster.jobs) == 1


def test_another_configuration_is_told_of() -> None:
    running = details(1, JobStatus.RUNNING, metadata=SPEC.to_metadata() | {"job_name": "x", "job_submission_id": "x"})
    assert begun(Cluster(running))[2] == []
    assert "another configuration" in begun(Cluster(running), JobSpec("1", TREE | {"name": "b"}))[2][0]


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.STOPPED, None, 143),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
    ],
)
def test_exit_codes(status: JobStatus, driver: int | None, code: int) -> None:
    assert jobs.exit_code(details(1, status, driver_exit_code=driver)) == code


PROCESSES = """
import subprocess, sys
command = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1], shell=True).returncode)"  # Ray's supervisor of the job
sys.exit(subprocess.run([sys.executable, "-c", command, sys.argv[1]]).returncode)
"""


def test_a_job_runs_in_the_python_of_its_ray(tmp_path: Path) -> None:
    """A process that has a raylet's arguments stands for one. The other Python is the one on the PATH."""
    pythons = {}
    for name in ("ray", "path"):
        pythons[name] = tmp_path / name / "python"
        pythons[name].parent.mkdir()
        pythons[name].write_text(f'#!/bin/sh\necho {name} "$@"\nexit 7\n')
        pythons[name].chmod(0o755)

    def said(environment: dict[str, Any], *arguments: str) -> str:
        raylet = [sys.executable, "-c", PROCESSES, entrypoint(environment), *arguments]
        path = f"{pythons['path'].parent}:{os.environ['PATH']}"
        found = subprocess.run(raylet, capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False)
        assert found.returncode == 7 and not found.stderr
        return found.stdout

    worker = f"--python_worker_command={pythons['ray']} setup_worker.py --node-ip-address=1.2.3.4"
    assert said({}, "--head", worker, "--x=y") == "ray -m taid_ray.cli.job\n"
    assert said({}) == "path -m taid_ray.cli.job\n"  # another Ray than we know
    assert said({"pip": ["taid-ray"]}, worker) == "path -m taid_ray.cli.job\n"
    assert said({"py_executable": f"{pythons['ray']} -s"}, worker) == "ray -s -m taid_ray.cli.job\n"


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("/usr/bin/python: No module named taid_ray", "no taid-ray;"),
        (
            "/usr/bin/python: Error while finding module specification for 'taid_ray.cli.job' (ModuleNotFoundError: No module "
            "named 'taid_ray')",
            "no taid-ray;",
        ),
        (
            "/usr/bin/python: No module named 'typer', which taid-ray needs",
            "not all that taid-ray needs, for example typer;",
        ),
    ],
)
def test_a_cluster_without_taid_ray(told: str, found: str) -> None:
    python = told.partition(": ")[0] if told[0] == "/" else "python"
    message = f"Job entrypoint command failed with exit code 1, last logs:\nRunning entrypoint for job x: y\n{told}\n"
    with pytest.raises(ClusterError, match=rf"^{python}, in which the cluster runs this job, has {found}"):
        check_end(details(1, JobStatus.FAILED, driver_exit_code=1, message=message))


def test_a_job_without_typer_names_its_python(tmp_path: Path) -> None:
    """As in the system's Python, where taid-ray is found by PYTHONPATH alone."""
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-m", "taid_ray.cli.job"], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (1, f"{sys.executable}: No module named 'typer', which taid-ray needs\n")


def test_a_job_that_ray_could_not_run() -> None:
    with pytest.raises(ClusterError, match="Ray could not run the job taid-RUN: no such package"):
        check_end(details(1, JobStatus.FAILED, message="no such package"))
    check_end(details(1, JobStatus.FAILED, driver_exit_code=2, message="error: loss.name"))


@settings(deadline=None)
@given(st.text(), st.lists(st.tuples(st.integers(0, 40), st.integers(1, 7))))
def test_a_log_is_whole_however_often_it_is_cut(text: str, cuts: list[tuple[int, int]]) -> None:
    written: list[str] = []
    log = jobs._Log(written.append)
    for end, size in [*cuts, (len(text), 5)]:
        log.place = 0
        for start in range(0, min(end, len(text)), size):
            log.add(text[start : min(start + size, end)])
    assert "".join(written) == text


def test_a_late_follower_sees_the_last_lines_once() -> None:
    written: list[str] = []
    log = jobs._Log(written.append)
    lines = [f"{number}\n" for number in range(100)]
    log.skip_all_but_last("".join(lines[:90]))
    log.add("".join(lines[:50]))
    log.add("".join(lines[50:]))
    assert "".join(written) == "".join(lines[90 - jobs.SHOWN_LINES :])


class Shaky(Cluster):
    """A job whose log comes in pieces, after each of which the connection is lost for a moment, an hour passing meanwhile.

    pieces: each as the whole log at that time; the last one is followed by the job's end.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pieces: list[str], fail_log: int = 0):
        super().__init__()
        self._pieces, self._fail_log, self._now, self._fail_info = pieces, fail_log, 1000.0, 0
        fake = SimpleNamespace(monotonic=lambda: self._now, sleep=self._pass)
        monkeypatch.setattr(jobs, "time", fake)

    def _pass(self, seconds: float) -> None:
        self._now += seconds

    def get_job_info(self, job: str) -> JobDetails:
        if self._fail_info:
            self._fail_info -= 1
            raise ConnectionError("down")
        return details(1, JobStatus.RUNNING if self._pieces else JobStatus.SUCCEEDED)

    def get_job_logs(self, job: str) -> str:
        if self._fail_log:
            self._fail_log -= 1
            raise RuntimeError("503")
        return self._pieces[0]

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield self._pieces.pop(0)
        if self._pieces:
            self._pass(3600)
            self._fail_info = 3
            raise ConnectionError("cut off")


def followed(cluster: Any, late: bool = False) -> tuple[str, list[str]]:
    written: list[str] = []
    said: list[str] = []
    end = jobs.follow(cluster, "taid-RUN", written.append, said.append, late)
    assert end.status == JobStatus.SUCCEEDED
    return "".join(written), said


def test_a_connection_may_be_lost_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    written, said = followed(Shaky(monkeypatch, ["a\n", "a\nb\n", "a\nb\nc\n"]))
    assert written == "a\nb\nc\n"
    assert said == ["the connection to http://head:8265 was lost (cut off); trying again"] * 2


def test_a_late_follower_whose_first_request_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    written, said = followed(Shaky(monkeypatch, ["a\n", "a\nb\n"], fail_log=2), late=True)
    assert written == "a\nb\n" and [line for line in said if "(503)" in line] == said[:1]


def test_a_connection_that_breaks_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a firewall forgets it: the log would say nothing for ever, while requests are answered."""
    monkeypatch.setattr(jobs, "SILENT_S", 0.01)
    cluster = Shaky(monkeypatch, ["a\n", "a\nb\n"])
    tails = 0

    async def tail_job_logs(job: str) -> AsyncIterator[str]:
        nonlocal tails
        tails += 1
        yield cluster._pieces.pop(0)
        if cluster._pieces:
            await asyncio.Event().wait()

    monkeypatch.setattr(cluster, "tail_job_logs", tail_job_logs)
    assert followed(cluster) == ("a\nb\n", [])
    assert tails == 2


def test_a_log_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something between lets requests through, but no log: what the job says of itself is no answer."""
    monkeypatch.setattr(jobs, "SILENT_S", 0.001)
    cluster = Shaky(monkeypatch, ["a\n"])

    async def tail_job_logs(job: str) -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    monkeypatch.setattr(cluster, "tail_job_logs", tail_job_logs)
    with pytest.raises(ClusterError, match=r"has not answered for 120 s \(no line of the log came for 0 s\)"):
        followed(cluster)


def test_a_pending_job_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two moments without an answer, an hour between them."""
    cluster = Shaky(monkeypatch, ["a\n"])
    answers: list[Any] = [ConnectionError(), *[JobStatus.PENDING] * 7200, ConnectionError(), JobStatus.RUNNING]

    def get_job_info(job: str) -> JobDetails:
        answer = answers.pop(0) if answers else JobStatus.SUCCEEDED
        if isinstance(answer, Exception):
            raise answer
        return details(1, answer)

    monkeypatch.setattr(cluster, "get_job_info", get_job_info)
    assert followed(cluster)[0] == "a\n"


def test_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Shaky(monkeypatch, ["a\n"])
    cluster._fail_info = 1000
    with pytest.raises(ClusterError, match=r"has not answered for 120 s \(down\); the job taid-RUN may go on there"):
        followed(cluster)


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in jobs.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ClusterError, match="no cluster to submit to: give --address"):
        jobs.connect(None)
    refuses = "{0}: no Jobs API of a Ray cluster|{0}: Ray's Jobs API refuses"
    with pytest.raises(ClusterError, match=refuses.format("nonsense://x")):
        jobs.connect("nonsense://x")
    timeouts: list[float] = []
    connect = socket.create_connection

    def knock(address: tuple[str, int], timeout: float) -> socket.socket:
        timeouts.append(timeout)
        return connect(address, timeout)

    monkeypatch.setattr(jobs.socket, "create_connection", knock)
    monkeypatch.setattr(jobs, "JobSubmissionClient", lambda *_, **__: pytest.fail("Ray itself would try for minutes"))
    for address in ("http://127.0.0.1:9", "127.0.0.1:9"):
        with pytest.raises(ClusterError, match=refuses.format(address)):
            jobs.connect(address)
    assert timeouts == [jobs.CONNECT_TIMEOUT_S] * 2 and jobs.CONNECT_TIMEOUT_S <= 5


def test_the_entry_point_does_what_was_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "own_version", lambda: "1")
    done: list[Any] = []
    monkeypatch.setattr(cli, "run", done.append)
    monkeypatch.setattr(cli, "search", lambda *given, **options: done.append((*given, options)))
    submitted(monkeypatch, SPEC)
    run_job()
    assert done == [build_config(TREE)]
    space = {"search": "grid", "space": {"schedule.alpha": {"choice": [0.1, 0.2]}}}
    submitted(monkeypatch, JobSpec("1", TREE, {"space": space, "options": {"out": "/x"}}))
    run_job()
    assert done[1][0] == build_config(TREE) and done[1][1].num_trials == 2 and done[1][2] == {"out": "/x"}
    submitted(monkeypatch, JobSpec("2", TREE))
    with pytest.raises(ConfigError, match=r"the cluster has taid-ray 1, and this job was submitted by taid-ray 2"):
        run_job()


def submitted(monkeypatch: pytest.MonkeyPatch, job_spec: JobSpec) -> None:
    metadata = {"job_submission_id": "x"} | job_spec.to_metadata()
    assert set(job_spec.to_metadata()) == {METADATA_KEY}
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {}, "metadata": metadata}))


def test_what_is_wrong_here_never_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "connect", lambda address: pytest.fail("it asked a cluster"))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(TREE))
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"search": "grid", "space": {"loss.nothing": {"choice": [1]}}}))
    for wrong, told in (
        (["loss.nothing=1"], "loss.nothing"),
        (["--space", str(tmp_path / "s.yaml")], "loss.nothing"),
        (["--trials", "3"], "give --space"),
    ):
        monkeypatch.setattr(sys, "argv", ["taid-ray", "submit", str(tmp_path / "c.yaml"), *wrong])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2 and told in capsys.readouterr().err
