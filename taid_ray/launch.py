"""The driver: prepares a run, starts its parts on the cluster, follows them, and takes everything down again."""

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from taid_ray.actors.live import announced
from taid_ray.cluster import (
    Demand,
    capacity_note,
    check_capacity,
    check_object_store,
    cluster_has_gpus,
    demand_of,
    ray_cluster,
)
from taid_ray.config import DistillConfig
from taid_ray.device import collective_backend, resolve
from taid_ray.errors import ClusterError, TaidRayError
from taid_ray.hub import connection_restored
from taid_ray.preflight import Job, Plan, notes, prepare
from taid_ray.progress import ProgressView
from taid_ray.run_dir import check_run_dir_is_new, run_directory, with_absolute_paths
from taid_ray.supervise import followed, own_interrupt, scheduler_actor, teacher_pool


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
    with connection_restored(), ProgressView() as view:
        view.say("checking models and data")
        plan = prepare(config)
        for note in notes(config, plan):
            view.say(f"note: {note}")
        view.say("connecting to Ray" if ray.is_initialized() or os.environ.get("RAY_ADDRESS") else "starting Ray here")
        with ray_cluster():
            device = resolve(config.device, cluster_has_gpus())
            demand = demand_of(config, device)
            check_capacity(demand)
            if config.teacher.mode == "pool":
                check_object_store(plan.payload_bytes, config.teacher, demand.workers)
            if room := capacity_note(demand):
                view.say(f"note: {room}")
            with run_directory(config):
                summary = run_on_cluster(config, plan, demand, view)
    return RunResult(config.run_dir, summary)


def run_on_cluster(config: DistillConfig, plan: Plan, demand: Demand, view: ProgressView) -> dict[str, Any]:
    """Starts scheduler, teacher pool and student workers side by side; the workers wait for the pool."""
    run_id = f"{config.name}-{uuid.uuid4().hex[:8]}"
    with (
        scheduler_actor(config, plan, f"taid-scheduler-{run_id}") as scheduler,
        teacher_pool(config, plan, demand, f"taid-teacher-{run_id}", scheduler, view) as pool,
        announced(config.run_dir, pool),
        followed(scheduler, plan, view),
    ):
        view.say(f"starting {demand.workers} student worker(s)")
        job = Job(config, plan, demand.device, scheduler.actor, pool)
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
                # Without checkpoints to resume from, any restart would begin again at step 1.
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=3),
            ),
        )
        try:
            with own_interrupt(view):
                return trainer.fit().return_value
        except ControllerError as error:
            raise ClusterError(
                f"Ray Train could not start {demand.workers} student worker(s): {str(error).splitlines()[-1]}; "
                "see `ray status` for what holds the cluster's resources"
            ) from error
        except TrainingFailedError as error:
            raise cause_of(error) from error


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
