"""The driver: prepares a run, starts its parts on the cluster, follows them, and takes everything down again."""

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from rich.console import Console

from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import DistillConfig
from taid_ray.data.store.prepared import PreparedData
from taid_ray.distributed.capacity import Demand, capacity_note, check_capacity, check_object_store, demand_of
from taid_ray.distributed.cluster import cluster_has_gpus, ray_cluster
from taid_ray.distributed.device import collective_backend, resolve
from taid_ray.distributed.network import RayNetworkConfig
from taid_ray.driver.asked_rows import AskedRows
from taid_ray.driver.attempts import AttemptContext, AttemptLoop
from taid_ray.driver.live import announce_cluster, liveness_file
from taid_ray.driver.notes import lost_documents, say_notes, schedule_notes
from taid_ray.driver.orphans import ending_orphaned_cleaners, own_job
from taid_ray.driver.outputs_import import import_outputs
from taid_ray.driver.pool import PoolKeeper, SharedPool
from taid_ray.driver.preflight import prepare, with_data
from taid_ray.driver.prepare import Preparation, prepare_data
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.progress_relay import progress_relay
from taid_ray.driver.same_data import check_same_data
from taid_ray.driver.signals import StopRequest, stop_signals
from taid_ray.models.hub import restoring_hub_mode
from taid_ray.names import POOL_PREFIX
from taid_ray.report.card import CARD_FILE, write_model_card
from taid_ray.report.format import print_line
from taid_ray.run.directory import (
    RunManifest,
    inspect_run_dir,
    on_its_day,
    read_summary,
    run_directory,
    scratch_directory,
)
from taid_ray.run.layout import CONFIG_FILE, REPORT_FILE
from taid_ray.run.log import run_logging
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.student.deepspeed_internals import use_deepspeed_on
from taid_ray.student.spec import Outcome, RunSpec, WorkerSpec
from taid_ray.tracking.follow import check_installed, tracking_session


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


@dataclass(frozen=True)
class RunContext:
    """Parts that a run finds there already, because it is one of many."""

    console: Console | None = None
    """Output instead of the terminal."""
    pool: Callable[[DistillConfig, RunSpec], str | None] | None = None
    """Names the teacher pool that the run may use; None: it needs one of its own."""
    data: Callable[[DistillConfig], PreparedData | None] | None = None
    """Gives the training data of the run if they are prepared already; None: the run prepares them."""
    stop: StopRequest | None = None
    """Request to stop of somebody else, instead of this process's signals."""
    on_validation: Callable[[dict[str, Any]], None] | None = None
    """Told of each validation, see progress_relay."""


STANDALONE = RunContext()


def distill(config: DistillConfig) -> RunResult:
    """Distils `config.teacher` into `config.student` on Ray and returns when the run directory is complete.

    Without a teacher (`teacher: null`, `loss.name: sft`) the student is trained on the data alone, in the same way.

    Goes on from the last checkpoint if the directory holds the same run, unfinished; returns at once if it is finished.
    Joins the Ray cluster this process is connected to or RAY_ADDRESS names; else starts a local one and stops it.
    Raises a TaidRayError for everything a user can put right.

    One run per process at a time: what belongs to a process is set for the run, environment variables (RAY_ADDRESS,
    RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S, HF_HUB_OFFLINE), handlers of signals, and constants of the model hub's client.
    """
    return run_distillation(config, STANDALONE)


def run_distillation(config: DistillConfig, context: RunContext) -> RunResult:
    """Distils as `distill` does, in a run that may be one of many."""
    config = with_absolute_paths(config)
    state = inspect_run_dir(config)
    if state == "finished":
        summary = read_summary(config.run_dir)
        if not all((config.run_dir / name).exists() for name in (CARD_FILE, REPORT_FILE)):
            leave_report(config, summary, partial(print_line, context.console or Console()))
        return RunResult(config.run_dir, summary)
    config = on_its_day(config, config.run_dir / CONFIG_FILE)
    check_installed(config)
    with restoring_hub_mode(), ProgressView(context.console) as view:
        view.say("checking models and data")
        spec = prepare(config)
        unchecked = check_same_data(config, spec.fingerprint) if state == "unfinished" and spec.fingerprint else None
        say_notes(config, spec, view.say)
        if unchecked:
            view.say(f"note: {unchecked}")
        view.say("connecting to Ray" if ray.is_initialized() or os.environ.get("RAY_ADDRESS") else "starting Ray here")
        with (
            run_directory(config) as run,
            run_logging(config.run_dir, run.id, view),
            liveness_file(config.run_dir),
            ray_cluster(),
        ):
            if run.attempts:
                view.say(
                    f"resuming the run in {config.run_dir}; its workers were started {run.attempts} time(s) before"
                )
            device = resolve(config.device, cluster_has_gpus())
            demand = demand_of(config, device)
            check_capacity(demand)
            if config.has_pool:
                check_object_store(spec.payload_bytes, config.given_teacher, demand.max_workers)
            if room := capacity_note(demand):
                view.say(f"note: {room}")
            with tracking_session(config, run.id, bool(run.attempts), view) as tracking:
                summary = tracking.finished(run_on_cluster(config, spec, demand, run, view, context))
            view.wait_for("drawing the report")
            leave_report(config, summary, view.say)
    return RunResult(config.run_dir, summary)


def run_on_cluster(
    config: DistillConfig, spec: RunSpec, demand: Demand, run: RunManifest, view: ProgressView, context: RunContext
) -> dict[str, Any]:
    """Starts scheduler, teacher pool and student workers; the workers wait for the pool, which outlives them.

    The data are prepared while the pool loads; before it where they decide the number of steps, which comes first.
    """
    shared = context.pool(config, spec) if context.pool else None
    own_pool = None if shared or not config.has_pool else POOL_PREFIX + run.id
    schedule, most = config.effective_schedule, config.student.workers.max
    with ExitStack() as parts:
        # First, so that taking everything down is not interrupted halfway; and nobody asks for a stop before it is told of.
        stop = context.stop or parts.enter_context(stop_signals())
        context = replace(context, stop=stop)
        parts.enter_context(ending_orphaned_cleaners(run.jobs))
        data = None
        if not spec.total_steps:
            announce_cluster(config.run_dir, None)
            spec, data = prepare_for_run(config, spec, demand, context, view)
        announce_cluster(config.run_dir, own_pool, spec.total_steps)
        scheduler = SchedulerOwner(f"taid-scheduler-{run.id}", schedule, spec.total_steps, most)
        parts.enter_context(scheduler)
        if shared:
            parts.enter_context(SharedPool(shared, scheduler.set_pool))
        elif own_pool:
            parts.enter_context(PoolKeeper(config, spec, demand, own_pool, scheduler.set_pool, view))
        if data is None and config.data.order == "global":
            spec, data = prepare_for_run(config, spec, demand, context, view)
        if config.teacher and config.teacher.mode == "file":
            import_outputs(AskedRows(config, spec, data, stop), view)
        progress = parts.enter_context(
            progress_relay(scheduler, config.run_dir, spec.total_steps, view, context.on_validation)
        )
        scratch = parts.enter_context(scratch_directory(config.run_dir))
        worker = WorkerSpec(
            config, spec, demand.device, scheduler.actor, shared or own_pool or "", run.checkpoints, data=data
        )
        attempts = AttemptLoop(config.student, AttemptContext(demand, scheduler, progress, stop, view))
        return attempts.run(TrainLauncher(worker, demand, run, scratch))


def prepare_for_run(
    config: DistillConfig, spec: RunSpec, demand: Demand, context: RunContext, view: ProgressView
) -> tuple[RunSpec, PreparedData]:
    """Prepares the training data, unless `context` gives them; returns them with the facts of the run that they complete.

    Raises what `prepare_data` and `check_same_data` raise, and the end that was requested meanwhile.
    """

    data = context.data(config) if context.data else None
    if data is None:
        cpus = min(1.0, demand.workers * demand.worker_cpus)  # of those that the workers will have
        work = Preparation(view.say, view.wait_for, context.stop, cpus)
        data = prepare_data(config, spec.vocabulary.num_shared, work)
    for note in lost_documents(config, f"{data.counts.documents:,}", data.counts.dropped, data.counts.truncated):
        view.say(f"note: {note}")
    complete = with_data(config, spec, data)
    if config.has_pool and complete.image_bytes:
        sizes = (complete.payload_bytes, config.given_teacher, demand.max_workers)
        check_object_store(*sizes, image_bytes=complete.image_bytes)
    if complete.fingerprint:
        check_same_data(config, complete.fingerprint)
    if not spec.total_steps:
        for note in schedule_notes(config, complete.total_steps):
            view.say(f"note: {note}")
    return complete, data


@dataclass(frozen=True)
class TrainLauncher:
    """Starts a group of student workers with Ray Train."""

    worker: WorkerSpec
    demand: Demand
    run_manifest: RunManifest
    scratch: str
    """A directory for Ray Train's own files."""

    def begin(self, workers: int) -> int:
        """Records in run.json that an attempt begins. Returns its number."""
        return self.run_manifest.begin_attempt(workers, own_job())

    def run(self, attempt: int, workers: int) -> Outcome:
        """Runs the attempt; see AttemptLoop. Raises what Ray Train raises."""
        config, demand = self.worker.config, self.demand
        # Else Ray Train would ask a stopped process for ten minutes how it is, whatever the other workers say.
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.student.timeout_s)
        trainer = TorchTrainer(
            start_worker,
            train_loop_config={"worker": replace(self.worker, attempt=attempt)},
            torch_config=RayNetworkConfig(
                backend=collective_backend(demand.device), timeout_s=math.ceil(config.peer_timeout_s)
            ),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=demand.device == "cuda",
                resources_per_worker=demand.worker_resources(),
            ),
            run_config=RunConfig(
                name=f"{self.run_manifest.id}-{attempt}",
                storage_path=self.scratch,
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            ),
        )
        outcome: Outcome = trainer.fit().return_value
        return outcome


def leave_report(config: DistillConfig, summary: dict[str, Any], notify: Callable[[str], None]) -> None:
    """Writes the model card and the report of a finished run. What fails is told, and the run stays finished."""

    def write_page() -> None:
        from taid_ray.report.run_page import write_run_report  # matplotlib takes a second to import

        write_run_report(config.run_dir)

    for name, write in (
        (CARD_FILE, lambda: write_model_card(config.run_dir, config, summary)),
        (REPORT_FILE, write_page),
    ):
        try:
            write()
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            notify(
                f"warning: the run is finished, but {name} could not be written ({told}); the same command tries again"
            )


def start_worker(arguments: dict[str, Any]) -> Outcome | None:
    """Runs in each Ray Train process. Everything heavy is imported here, after the environment is right for it."""
    worker: WorkerSpec = arguments["worker"]
    use_deepspeed_on(worker.device)
    from taid_ray.student.worker import run_worker

    return run_worker(worker)
