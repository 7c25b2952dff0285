"""One trial of a search: an ordinary run, driven by Ray Tune's process for it instead of by a terminal."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from rich.console import Console

from taid_ray.config.schema import DistillConfig
from taid_ray.config.space import trial_config
from taid_ray.data.store.prepared import PreparedData
from taid_ray.driver.launch import RunContext, run_distillation
from taid_ray.driver.signals import POLL_S, StopRequest
from taid_ray.errors import TaidRayError
from taid_ray.files import read_lines
from taid_ray.run.directory import inspect_run_dir
from taid_ray.run.layout import TRIALS, VALIDATION_FILE
from taid_ray.student.spec import RunSpec

STOP_FILE, ERROR_SUFFIX, LOG_SUFFIX = ".stop", ".error", ".log"


@dataclass(frozen=True)
class SearchJob:
    """Description of a search, which its driver hands to every trial."""

    directory: Path
    """Directory of the search."""
    tree: dict[str, Any]
    """Base configuration."""
    total_steps: int
    """Number of steps of a run of the base configuration."""
    pool: str | None
    """Name of the teacher pool's Serve application; None: the trials have teachers of their own."""
    pool_spec: Any
    """Result of `pool_spec` for the base configuration."""
    data_spec: Any
    """Result of `data_spec` for the base configuration."""
    data: PreparedData | None
    """Training data of the base configuration; None with `data.order: blocks`."""
    stopped: frozenset[str]
    """Trials that the scheduler stopped while an earlier driver ran."""
    variants: dict[str, dict[str, Any]]
    """Values by the name of a variant, see `Space`."""


def pool_spec(config: DistillConfig, spec: RunSpec) -> Any:
    """The settings that two runs must have in common to share a teacher pool. The others of the section are the clients' own."""
    own = {"window", "window_mib", "hedge_after", "timeout_s"}
    teacher = config.teacher and config.teacher.model_dump(mode="json", exclude=own)
    return teacher, spec.vocabulary.num_shared


def data_spec(config: DistillConfig) -> Any:
    """The settings that two runs must have in common to train on the same prepared data."""
    models = [
        model and model.model_dump(mode="json", include={"model", "revision", "trust_remote_code"})
        for model in (config.teacher, config.student)
    ]
    return config.data.model_dump(mode="json", exclude={"block_documents"}), models, config.student.resize_to_teacher


def run_trial(params: dict[str, Any], job: SearchJob) -> None:
    """Runs a trial; Ray Tune's trainable. Reports each validation once, the last when the run is complete.

    A trial of an earlier driver is not repeated: its validations are reported, and it goes on from there. Raises what the
    run failed with, which is then also written beside its directory.
    """
    name = str(tune.get_context().get_trial_name())
    run_dir = job.directory / TRIALS / name
    error_file = run_dir.with_suffix(ERROR_SUFFIX)
    error_file.unlink(missing_ok=True)
    # Ray's own helpers look for a cluster by this variable; a second cluster on this machine would confuse them.
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        if name in job.stopped:
            report_all(run_dir)
        elif not (job.directory / STOP_FILE).exists():
            distil_trial(named(job.tree, name, run_dir), params, job)
    except Exception as error:
        told = str(error) if isinstance(error, TaidRayError) else f"{type(error).__name__}: {error}"
        error_file.write_text(told, encoding="utf-8")
        raise


def distil_trial(tree: dict[str, Any], params: dict[str, Any], job: SearchJob) -> None:
    """Runs a trial to its end, or until the search is asked to stop."""
    config = trial_config(tree, params, job.total_steps, job.variants)
    finished_before = inspect_run_dir(config) == "finished"

    def shared(own: DistillConfig, spec: RunSpec) -> str | None:
        return job.pool if job.pool and pool_spec(own, spec) == job.pool_spec else None

    def data(own: DistillConfig) -> PreparedData | None:
        return job.data if data_spec(own) == job.data_spec else None

    config.run_dir.parent.mkdir(parents=True, exist_ok=True)
    with (
        config.run_dir.with_suffix(LOG_SUFFIX).open("a", encoding="utf-8") as log,
        stop_file_watch(job.directory) as stop,
    ):
        console = Console(file=log, width=130)
        try:
            result = run_distillation(config, RunContext(console, shared, data, stop, report))
        except (KeyboardInterrupt, SystemExit):
            return  # the search was asked to stop, and the run has a checkpoint
    if finished_before:
        report_all(config.run_dir)
        return
    # Not before the summary is there: a scheduler ends a trial that has reported its last step.
    report(result.summary["validations"][-1])


def named(tree: dict[str, Any], name: str, run_dir: Path) -> dict[str, Any]:
    """The base configuration with a trial's own name and directory."""
    return tree | {"name": f"{tree['name']}-{name}", "out": str(run_dir)}


def report(figures: dict[str, Any]) -> None:
    """Reports one validation to Ray Tune: step, cross_entropy and, with a teacher, kl."""
    tune.report({key: figures[key] for key in ("step", "kl", "cross_entropy") if key in figures})


def report_all(run_dir: Path) -> None:
    """Reports all validations of a run to Ray Tune."""
    for figures in read_lines(run_dir / VALIDATION_FILE):
        report(figures)


@contextmanager
def stop_file_watch(directory: Path) -> Iterator[StopRequest]:
    """Watches for the request to stop with a checkpoint, which the search's driver leaves as a file."""
    stop, over = StopRequest(), threading.Event()

    def watch() -> None:
        while not over.wait(POLL_S):
            if (directory / STOP_FILE).exists():
                stop.request(signal.SIGTERM)
                return

    threading.Thread(target=watch, name="taid-stop-file", daemon=True).start()
    try:
        yield stop
    finally:
        over.set()
