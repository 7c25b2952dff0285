"""Submission of a run or search as a Ray job: checked here, run there (`taid-ray submit`)."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobDetails, JobSubmissionClient

from taid_ray.config.schema import DistillConfig
from taid_ray.control import jobs
from taid_ray.control.job_spec import JobSpec, own_version
from taid_ray.errors import ClusterError, ConfigError

RUN_JOB = "-m taid_ray.cli.job"
IN_RAYS_PYTHON = (
    "raylet=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$PPID/status 2>/dev/null); "
    "python=$(tr '\\0' '\\n' < /proc/$raylet/cmdline 2>/dev/null | "
    "sed -n 's/^--python_worker_command=\\([^ ]*\\).*/\\1/p'); "
    f'exec "${{python:-python}}" {RUN_JOB}'
)
"""Runs the job in the interpreter that Ray starts its workers in, which need not be on the PATH: Ray may have been started by
the path of a virtual environment. Ray tells a job nothing of it, but the shell's parent is Ray's supervisor of the job, whose
parent is the node's raylet, and that has the command of its workers among its arguments."""
OWN_PYTHON = ("pip", "uv", "conda", "container", "image_uri")
"""Keys of a runtime_env that bring an interpreter of their own, which Ray puts on the job's PATH."""
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
"""Time that Ray gives the job's driver to save a checkpoint when it is stopped; by default it kills it after 3 s."""
ABSENT = re.compile(r"^(?:(/\S+): .*|ModuleNotFoundError: )No module named '?(\w+)", re.MULTILINE)
"""What Python, or `taid_ray.cli.job`, says: the interpreter, where it is named, and the module."""
TRIES = 10


@dataclass(frozen=True)
class SubmitOptions:
    """Options of `taid-ray submit`, beside the configuration."""

    search: dict[str, Any] | None = None
    """See JobSpec."""
    address: str | None = None
    """The cluster's Jobs API; None: what the environment names."""
    wait: bool = True
    """Whether to follow the job to its end."""
    working_dir: Path | None = None
    """Directory to send along."""
    runtime_env: Path | None = None
    """YAML file with more of the job's runtime_env."""


def submit(
    config: DistillConfig, options: SubmitOptions, notify: Callable[[str], None], write: Callable[[str], None]
) -> int | None:
    """Submits a run or search, or follows its job that is under way. Returns the job's exit code; None without waiting.

    write: takes the job's log as it comes. Raises ConfigError for what cannot work on the cluster, ClusterError if the
    cluster does not answer or has no taid-ray, KeyboardInterrupt at Ctrl-C, which leaves the job running.
    """
    check_travels(config, options.working_dir)
    environment = runtime_environment(options.runtime_env, options.working_dir)
    client = jobs.connect(options.address)
    job_spec = JobSpec(own_version(), config.model_dump(mode="json"), options.search)
    job, late = begin(client, job_name(str(config.out)), job_spec, environment, notify)
    notify(f"job {job} {'is under way already' if late else 'submitted'} at {client.get_address()}")
    if not options.wait:
        return None
    try:
        ended = jobs.follow(client, job, write, notify, late)
    except KeyboardInterrupt:
        notify(
            f"\nthe job goes on; the same command follows it again, `taid-ray stop {config.out}` stops it with a checkpoint"
        )
        raise
    check_end(ended)
    code = jobs.exit_code(ended)
    again = "; the same command goes on with it" if code == jobs.STOPPED_CODE else ""
    notify(f"job {job}: {ended.status.lower()}{again}")
    return code


def check_travels(config: DistillConfig, working_dir: Path | None) -> None:
    """Raises ConfigError for paths that mean nothing on the cluster."""
    written = {
        "out": config.out,
        "checkpoint.storage": config.checkpoint.storage,
        "cache.directory": config.cache.directory,
        "data.store": config.data.store,
    }
    for key, value in written.items():
        if value is not None and "://" not in value and not Path(value).is_absolute():
            raise ConfigError(
                f"{key}: {value} is relative, and what a job writes there would be lost with its working directory; name an "
                f"absolute path, on a disk that all nodes of the cluster share{' (--out)' if key == 'out' else ''}"
            )
    if config.out is None:
        raise ConfigError(
            "out: missing. Name the run directory with --out, an absolute path on a disk that all nodes of the cluster share"
        )
    read = {
        "teacher.model": config.teacher and config.teacher.model,
        "teacher.outputs": config.teacher and config.teacher.outputs,
        "student.model": config.student.model,
        **{f"data.{key}": getattr(config.data, key) for key in ("train", "valid", "chat_template")},
    }
    for key, value in read.items():
        if value and "{" not in value and _is_only_here(value, working_dir):
            raise ConfigError(
                f"{key}: {value} is a path on this machine, not of the cluster; send the directory that it is in with "
                "--working-dir, or give an absolute path of the cluster, or a hub name"
            )


def _is_only_here(value: str, working_dir: Path | None) -> bool:
    with suppress(OSError, RuntimeError):  # a name too long for a file, or of nobody's home
        path = Path(value).expanduser()
        return not Path(value).is_absolute() and path.exists() and not (working_dir and (working_dir / value).exists())
    return False


def runtime_environment(path: Path | None, working_dir: Path | None) -> dict[str, Any]:
    """The job's runtime_env: that of a YAML or JSON file, if one is given, with STOP_WAIT and working_dir. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--runtime-env: {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--runtime-env: {path} holds no mapping; see Ray's documentation of runtime environments")
    if "working_dir" in content:
        raise ConfigError(f"--runtime-env: {path} has working_dir, which is --working-dir here; remove it there")
    if working_dir is not None:
        if not working_dir.is_dir():
            raise ConfigError(f"--working-dir: {working_dir} is no directory; name one of this machine")
        content["working_dir"] = str(working_dir.absolute())
    variables = content.get("env_vars") or {}
    if not isinstance(variables, dict):
        raise ConfigError(f"--runtime-env: env_vars in {path} is no mapping; write NAME: value")
    return content | {"env_vars": STOP_WAIT | {str(name): str(value) for name, value in variables.items()}}


def job_name(out: str) -> str:
    """Id of the first job of a run directory, the same for every submission; later ones get a number more."""
    path = os.path.normpath(out)
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", os.path.basename(path)).strip("-.")[:40]
    return f"taid-{readable}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def begin(
    client: JobSubmissionClient,
    name: str,
    job_spec: JobSpec,
    environment: Mapping[str, Any],
    notify: Callable[[str], None],
) -> tuple[str, bool]:
    """Submits a job for the run, unless one is under way. Returns its id, and True if it was under way already."""
    with jobs.answering(client.get_address()):
        for _ in range(TRIES):
            number, last = jobs.newest(client, name)
            if last is not None and not last.status.is_terminal():
                if last.metadata != job_spec.to_metadata() | _given_by_ray(last):
                    notify("note: it was submitted with another configuration than this one")
                return str(last.submission_id), True
            wanted = name if not number else f"{name}-{number + 1}"
            try:
                client.submit_job(
                    entrypoint=entrypoint(environment),
                    submission_id=wanted,
                    runtime_env=dict(environment),
                    metadata=job_spec.to_metadata(),
                )
            except RuntimeError as error:
                if "already exists" not in str(error):  # else somebody else was faster
                    raise
            else:
                return wanted, False
    raise ClusterError(f"{client.get_address()}: no job of the name {name} could be begun in {TRIES} tries; try again")


def entrypoint(environment: Mapping[str, Any]) -> str:
    """The shell command of a job with this runtime_env, in the interpreter of the workers."""
    if "py_executable" in environment:
        return f"{environment['py_executable']} {RUN_JOB}"
    return f"python {RUN_JOB}" if environment.keys() & set(OWN_PYTHON) else IN_RAYS_PYTHON


def _given_by_ray(job: JobDetails) -> dict[str, str]:
    return {key: value for key, value in (job.metadata or {}).items() if key.startswith("job_")}


def check_end(job: JobDetails) -> None:
    """Raises ClusterError if the job has failed because there is no taid-ray, or because Ray could not start it."""
    message = job.message or ""
    if job.driver_exit_code is None and message and jobs.exit_code(job) == jobs.FAILED_CODE:
        raise ClusterError(f"Ray could not run the job {job.submission_id}: {message.strip()[-2000:]}")
    absent = ABSENT.search(message)
    if job.driver_exit_code == 1 and absent:
        python, module = absent.groups()
        what = "no taid-ray" if module == "taid_ray" else f"not all that taid-ray needs, for example {module}"
        raise ClusterError(
            f"{python or 'python'}, in which the cluster runs this job, has {what}; install taid-ray there, on all nodes, or "
            "use an image with this version of it (cluster/Dockerfile)"
        )
