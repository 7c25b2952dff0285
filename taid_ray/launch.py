"""The driver: prepares a run, starts its parts on the cluster, follows them, and takes everything down again."""

import os
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from taid_ray.cluster import Demand, check_capacity, check_object_store, cluster_has_gpus, demand_of, ray_cluster
from taid_ray.config import DistillConfig
from taid_ray.device import collective_backend, resolve
from taid_ray.errors import ConfigError, TaidRayError
from taid_ray.metrics import CONFIG_FILE, METRICS_FILE
from taid_ray.preflight import Job, Plan, prepare
from taid_ray.progress import ProgressView
from taid_ray.schedule import adaptive_is_linear
from taid_ray.supervise import followed, scheduler_actor, teacher_pool


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    path: Path
    """The run directory."""
    summary: dict[str, Any]
    """The content of summary.json."""

    @property
    def model(self) -> Path:
        """Hugging Face directory of the trained student."""
        return self.path / "model"


def distill(config: DistillConfig) -> RunResult:
    """Distils `config.teacher` into `config.student` on Ray and returns when the run directory is complete.

    Joins the Ray cluster this process is connected to or RAY_ADDRESS names; else starts a local one and stops it.
    Raises a TaidRayError for everything a user can put right.
    """
    check_run_dir_is_new(config.run_dir)
    config = with_absolute_paths(config)
    with ProgressView() as view:
        view.say("checking models and data")
        plan = prepare(config)
        warn_about_schedule(config, plan, view)
        view.say("connecting to Ray" if ray.is_initialized() or os.environ.get("RAY_ADDRESS") else "starting Ray here")
        with ray_cluster():
            device = resolve(config.device, cluster_has_gpus())
            demand = demand_of(config, device)
            check_capacity(demand)
            if config.teacher.mode == "pool":
                check_object_store(plan.payload_bytes, config.teacher.window, demand.workers)
            with run_directory(config):
                summary = run_on_cluster(config, plan, demand, view)
    return RunResult(config.run_dir, summary)


def run_on_cluster(config: DistillConfig, plan: Plan, demand: Demand, view: ProgressView) -> dict[str, Any]:
    """Starts scheduler, teacher pool and student workers side by side; the workers wait for the pool."""
    run_id = f"{config.name}-{uuid.uuid4().hex[:8]}"
    with (
        scheduler_actor(config, plan, f"taid-scheduler-{run_id}") as scheduler,
        teacher_pool(config, plan, demand, f"taid-teacher-{run_id}", scheduler, view) as pool,
        followed(scheduler, plan, view),
    ):
        view.say(f"starting {demand.workers} student worker(s)")
        job = Job(config, plan, demand.device, scheduler, pool)
        trainer = TorchTrainer(
            start_worker,
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend=collective_backend(demand.device)),
            scaling_config=ScalingConfig(
                num_workers=demand.workers,
                use_gpu=demand.device == "cuda",
                resources_per_worker=demand.worker_resources(),
            ),
            run_config=RunConfig(
                name=run_id,
                storage_path=str(config.run_dir / "checkpoints"),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
            ),
        )
        try:
            with own_interrupt():
                return trainer.fit().return_value
        except TrainingFailedError as error:
            raise cause_of(error) from error


@contextmanager
def own_interrupt() -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt. Ray Train leaves a handler behind that stops the workers and ends the process."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def start_worker(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Runs in each Ray Train process. Everything heavy is imported here, after the environment is right for it."""
    job: Job = arguments["job"]
    use_deepspeed_on(job.device)
    from taid_ray.worker import run_worker

    return run_worker(job)


def use_deepspeed_on(device: str) -> None:
    """Settles DeepSpeed's accelerator before its first import.

    On a CPU its optional shared-memory collectives would be compiled at the first start (minutes, and a process killed
    meanwhile leaves a lock that hangs every later run); gloo does the same work, so that operator is declared absent.
    """
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def warn_about_schedule(config: DistillConfig, plan: Plan, view: ProgressView) -> None:
    """Says so when the adaptive rule cannot leave its linear floor."""
    schedule = config.schedule
    t_start, t_end, steps = schedule.t_start, schedule.t_end, plan.total_steps
    adaptive = config.loss.name == "taid" and schedule.mode == "adaptive"
    if adaptive and adaptive_is_linear(t_start, t_end, schedule.alpha, steps):
        enough = 2 * (t_end - t_start) / ((1 - t_start) * steps)
        view.say(
            f"note: with schedule.alpha {schedule.alpha:g} and {steps} steps, adaptive t stays on its linear floor; "
            f"from about {enough:.2g} on it would leave it"
        )


def with_absolute_paths(config: DistillConfig) -> DistillConfig:
    """Local files and directories by their absolute paths: workers on a cluster start in other directories."""

    def absolute(value: str | None) -> str | None:
        if not value or "{" in value:  # a chat template may be given as text
            return value
        path = Path(value).expanduser()
        return str(path.absolute()) if path.exists() else value

    data = {key: absolute(getattr(config.data, key)) for key in ("train", "valid", "chat_template")}
    return config.model_copy(
        update={
            "out": str(config.run_dir),
            "teacher": config.teacher.model_copy(update={"model": absolute(config.teacher.model)}),
            "student": config.student.model_copy(update={"model": absolute(config.student.model)}),
            "data": config.data.model_copy(update=data),
        }
    )


def check_run_dir_is_new(run_dir: Path) -> None:
    """Raises ConfigError if `run_dir` holds another run, or anything else, or if it cannot be made."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"out: {run_dir} is a file; name a directory that does not exist yet")
    if run_dir.exists() and any(run_dir.iterdir()):
        held = "another run" if (run_dir / CONFIG_FILE).exists() else "other files"
        raise ConfigError(f"out: {run_dir} already holds {held}; choose another directory with --out, or remove it")
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".taid-probe-", dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"out: {run_dir} cannot be made, because nothing can be written to {existing} ({error.strerror}); "
            "choose another directory with --out"
        ) from None


def write_config(config: DistillConfig) -> None:
    """Makes the run directory and leaves the resolved configuration in it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (config.run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")


@contextmanager
def run_directory(config: DistillConfig) -> Iterator[None]:
    """Makes the run directory; removes it again if the run ends before its first step by what a user can put right."""
    write_config(config)
    try:
        yield
    except (TaidRayError, KeyboardInterrupt):
        metrics = config.run_dir / METRICS_FILE
        if not metrics.exists() or not metrics.stat().st_size:
            shutil.rmtree(config.run_dir, ignore_errors=True)
        raise


def cause_of(error: BaseException) -> BaseException:
    """The TaidRayError inside a failure of the worker group, if there is one; else the failure itself."""
    failures = getattr(error, "worker_failures", {})
    for failure in [failures[rank] for rank in sorted(failures)]:
        inner: BaseException | None = failure
        while inner is not None:
            if isinstance(inner, TaidRayError):
                return inner
            inner = getattr(inner, "cause", None) or inner.__cause__
    return error
