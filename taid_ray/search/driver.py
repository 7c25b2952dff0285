"""The driver of a search: one teacher pool, many trials chosen by Ray Tune, and the report on them.

Every trial is an ordinary run in a directory of its own (see trial). What is known of a search is in these directories
and in trials.json, so a search that was interrupted goes on by starting a new Ray Tune experiment, in which trials of
before report what they have done already. Ray Tune's own state is pickled, may lag behind, and is never read back.
"""

import os
import shutil
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from taid_ray.config.schema import DistillConfig
from taid_ray.config.space import Space
from taid_ray.distributed.capacity import Demand, check_capacity, check_object_store, demand_of, room_for_trials
from taid_ray.distributed.cluster import cluster_has_gpus, ray_cluster
from taid_ray.distributed.device import resolve
from taid_ray.driver.live import announce_cluster, liveness_file
from taid_ray.driver.orphans import ending_orphaned_cleaners
from taid_ray.driver.pool import PoolKeeper
from taid_ray.driver.preflight import preflight_notes, prepare
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.signals import StopRequest, run_in_thread, stop_signals
from taid_ray.errors import ClusterError
from taid_ray.models.hub import restoring_hub_mode
from taid_ray.report.search_page import write_report
from taid_ray.report.search_results import Search, Trial, read_search
from taid_ray.run.directory import jobs_of, read_manifest
from taid_ray.run.layout import RAY_TRAIN_PREFIX, RUN_FILE, TRIALS
from taid_ray.run.log import run_logging
from taid_ray.search.book import TrialBook
from taid_ray.search.callbacks import TrialsShown, Watcher
from taid_ray.search.directory import base_config, search_directory
from taid_ray.search.trial import STOP_FILE, SearchJob, pool_spec, run_trial
from taid_ray.search.tuning import sampled, scheduler, searcher
from taid_ray.student.spec import RunSpec
from taid_ray.tracking.follow import check_installed, tell_stopped

SCRATCH = ".tune"
TRIAL_RESOURCES = {"CPU": 0, "node:__internal_head__": 0.001}
"""Of the process that drives a trial; its workers ask for their own. It lives on the head node, as the search does."""


@dataclass(frozen=True)
class SearchResult:
    """A search whose trials have all ended."""

    path: Path
    """Its directory, with report.html and best.yaml."""
    search: Search

    @property
    def best(self) -> Trial | None:
        """None if no trial finished."""
        return self.search.best()


def run_search(
    config: DistillConfig,
    space: Space,
    out: str | Path | None = None,
    max_concurrent: int | None = None,
    share_outputs: bool = True,
) -> SearchResult:
    """Tries the values of `space` on `config` and returns when every trial has ended.

    out: its directory; default runs/NAME-search. Goes on with what it holds, if that is the same search. max_concurrent:
    default: as many as the cluster has room for. share_outputs: lets the teacher compute each sample once for all trials,
    which changes figures in the sixth digit. Raises a TaidRayError for everything a user can put right.
    """
    config = base_config(config, out, share_outputs)
    check_installed(config)
    trials = TrialsShown(config.run_dir)
    with restoring_hub_mode(), ProgressView(above=trials.table) as view:
        view.say("checking models, data and the search space")
        spec = prepare(config)
        space.check(config.model_dump(mode="json"), spec.total_steps)
        if not any(key.startswith("schedule.") for key in space.space):
            for note in preflight_notes(config, spec):
                view.say(f"note: {note}")
        with (
            search_directory(config, space) as (book, name),
            run_logging(config.run_dir, name, view),
            liveness_file(config.run_dir),
        ):
            if len(book.with_status("finished", "stopped")) < space.num_trials:
                with ray_cluster():
                    demand = demand_of(config, resolve(config.device, cluster_has_gpus()))
                    check_capacity(demand)
                    before = book.with_status("stopped")
                    try:
                        run_trials(config, space, spec, demand, book, name, max_concurrent, trials, view)
                    finally:
                        for trial in sorted({*book.with_status("stopped")} - {*before}):
                            # Ray Tune ended its process, with what it had not passed on yet.
                            tell_stopped(book.run_dir(trial), view)
            found = read_search(config.run_dir)
            write_report(found)
    return SearchResult(config.run_dir, found)


def run_trials(
    config: DistillConfig,
    space: Space,
    spec: RunSpec,
    demand: Demand,
    book: TrialBook,
    name: str,
    max_concurrent: int | None,
    trials: TrialsShown,
    view: ProgressView,
) -> None:
    """Keeps one teacher pool up while Ray Tune runs the trials. Ends early, resumable, after Ctrl-C or SIGTERM."""
    own_teachers = any(key.startswith("teacher.") for key in space.space)
    up: Future[None] = Future()

    def tell(error: Exception | None) -> None:
        if not up.done():
            up.set_exception(error) if error else up.set_result(None)

    pooled = config.teacher.mode == "pool" and not own_teachers
    pool_name = f"taid-teacher-{name}"
    announce_cluster(config.run_dir, pool_name if pooled else None)
    together = replace(demand, max_workers=demand.max_workers * (max_concurrent or space.num_trials))
    with (
        stop_signals() as stop,
        ending_orphaned_cleaners(former_jobs(config.run_dir)),
        PoolKeeper(config, spec, together, pool_name, tell, view) if pooled else nullcontext(),
    ):
        if pooled:
            wait_for_pool(up, stop)
        room = room_for_trials(demand, own_teachers)
        concurrent = min(max_concurrent or room, room)
        if not concurrent:
            raise ClusterError(
                "the cluster has no room for a trial at present: other jobs hold what its nodes have; see `ray status`"
            )
        if pooled:
            check_object_store(spec.payload_bytes, config.teacher, concurrent * demand.workers)
        view.say(
            f"{space.num_trials} trials, {concurrent} at a time, {len(book.with_status('finished'))} finished before"
        )
        stopped = frozenset(book.with_status("stopped"))
        tree = config.model_dump(mode="json")
        shared = pool_name if pooled else None
        job = SearchJob(config.run_dir, tree, spec.total_steps, shared, pool_spec(config, spec), stopped)
        run_tune(space, book, job, concurrent, stop, trials, view)
        if stop.requested:
            raise stop.end()


def run_tune(
    space: Space,
    book: TrialBook,
    job: SearchJob,
    concurrent: int,
    stop: StopRequest,
    trials: TrialsShown,
    view: ProgressView,
) -> None:
    """Returns when all trials have ended, or those that ran when a signal came."""
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl has it all
        "RAY_AIR_NEW_OUTPUT": "0",  # no tables of its own
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # told by Watcher
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that is asked to stop may have nothing to report
    }.items():
        os.environ.setdefault(name, value)
    stop_file = job.directory / STOP_FILE
    stop_file.unlink(missing_ok=True)
    watcher = Watcher(book, stop, view)
    trials.begun = True

    def named(trial: Any) -> str:
        return book.assign_name(trial.config)

    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, job=job), TRIAL_RESOURCES),
        param_space=None if space.search == "optuna" else sampled(space),
        tune_config=tune.TuneConfig(
            metric=space.metric,
            mode="min",
            num_samples=1 if space.search == "grid" else space.num_trials,
            max_concurrent_trials=concurrent if space.search == "optuna" else None,
            search_alg=searcher(space, book, concurrent),
            scheduler=scheduler(space, job.total_steps),
            trial_name_creator=named,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=SCRATCH, storage_path=str(job.directory), verbose=0, callbacks=[watcher], stop=watcher.stopper()
        ),
    )

    def look() -> None:
        view.wait_for(trials.activity())
        if stop.at_once:
            raise stop.end()
        if stop.requested and not stop_file.exists():
            view.say("stopping: the trials save a checkpoint after their step; once more to stop at once")
            stop_file.touch()

    try:
        run_in_thread(tuner.fit, look)
    finally:
        stop_file.unlink(missing_ok=True)
        for left in (
            job.directory / SCRATCH,
            *job.directory.glob(f"{TRIALS}/*/{RAY_TRAIN_PREFIX}*"),
        ):  # of stopped trials
            shutil.rmtree(left, ignore_errors=True)


def former_jobs(directory: Path) -> set[str]:
    """The Ray jobs, as `driver.orphans.own_job` names them, of the drivers that this search's trials have had."""
    manifests = [read_manifest(path) for path in directory.glob(f"{TRIALS}/*/{RUN_FILE}")]
    return {job for manifest in manifests if manifest for job in jobs_of(manifest)}


def wait_for_pool(up: Future[None], stop: StopRequest) -> None:
    """Raises what the pool failed with."""
    while not up.done():
        if stop.requested:
            raise stop.end()
        time.sleep(0.1)
    up.result()
