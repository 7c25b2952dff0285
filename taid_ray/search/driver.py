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

from ray import tune

from taid_ray.config.schema import DistillConfig
from taid_ray.config.space import Space
from taid_ray.distributed.capacity import Demand, check_capacity, check_object_store, demand_of, room_for_trials
from taid_ray.distributed.cluster import cluster_has_gpus, ray_cluster
from taid_ray.distributed.device import resolve
from taid_ray.driver.launch import RunContext, prepare_for_run
from taid_ray.driver.live import announce_cluster, liveness_file
from taid_ray.driver.notes import say_notes
from taid_ray.driver.orphans import ending_orphaned_cleaners
from taid_ray.driver.pool import PoolKeeper
from taid_ray.driver.preflight import prepare
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.signals import StopRequest, run_in_thread, stop_signals
from taid_ray.errors import ClusterError, RunError
from taid_ray.models.hub import restoring_hub_mode
from taid_ray.names import POOL_PREFIX
from taid_ray.report.search_page import write_report
from taid_ray.report.search_results import Search, Trial, read_search
from taid_ray.run.directory import jobs_of, read_manifest
from taid_ray.run.layout import RAY_TRAIN_PREFIX, REPORT_FILE, RUN_FILE, TRIALS
from taid_ray.run.log import run_logging
from taid_ray.search.book import TrialBook
from taid_ray.search.callbacks import TrialsShown, Watcher
from taid_ray.search.directory import base_config, search_directory
from taid_ray.search.trial import STOP_FILE, SearchJob, data_spec, pool_spec, run_trial
from taid_ray.search.tuning import sampled, scheduler, searcher
from taid_ray.student.spec import RunSpec
from taid_ray.tracking.follow import check_installed, tell_stopped

SCRATCH = ".tune"
TRIAL_RESOURCES = {"CPU": 0, "node:__internal_head__": 0.001}
"""Resources of the process that drives a trial; its workers ask for their own. It lives on the head node, as the search does."""
POOL_POLL_S = 0.1


@dataclass(frozen=True)
class SearchResult:
    """A search whose trials have all ended."""

    path: Path
    """Its directory, with report.html and best.yaml."""
    search: Search

    @property
    def best(self) -> Trial | None:
        """The finished trial with the lowest figure; None if none finished."""
        return self.search.best()


def run_search(
    config: DistillConfig,
    space: Space,
    out: str | Path | None = None,
    max_concurrent: int | None = None,
    share_outputs: bool = True,
) -> SearchResult:
    """Tries the values of `space` on `config` and returns when every trial has ended.

    out: the search's directory, by default runs/NAME-search; if it holds the same search, that goes on. max_concurrent: by
    default as many trials as the cluster has room for. share_outputs: lets the teacher compute each sample once for all
    trials, which changes figures in the sixth digit. Raises a TaidRayError for everything a user can put right.
    """
    config = base_config(config, out, share_outputs)
    check_installed(config)
    shown = TrialsShown(config.run_dir)
    with restoring_hub_mode(), ProgressView(above=shown.table) as view:
        view.say("checking models, data and the search space")
        spec = prepare(config)
        if spec.total_steps:  # else the data must be prepared before
            space.check(config.model_dump(mode="json"), spec.total_steps)
        say_notes(config, spec, view.say, not any(key.startswith("schedule.") for key in space.keys))
        with (
            search_directory(config, space) as (book, name),
            run_logging(config.run_dir, name, view),
            liveness_file(config.run_dir),
        ):
            if len(book.with_status("finished", "stopped")) < space.num_trials:
                SearchDriver(config, space, spec, book, name, max_concurrent, shown, view).run()
            search = read_search(config.run_dir)
            leave_report(search, view)
    return SearchResult(config.run_dir, search)


def leave_report(search: Search, view: ProgressView) -> None:
    """Writes best.yaml and the report of a search. That a report could not be drawn is told only: the trials are there.

    Raises RunError if best.yaml cannot be written, for `taid-ray train` would then take an older one.
    """
    try:
        write_report(search)
    except RunError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        view.say(f"warning: {REPORT_FILE} could not be written ({told}); the same command tries again")


@dataclass(frozen=True)
class SearchDriver:
    """Runs the trials of a search whose directory this process holds."""

    config: DistillConfig
    """Configuration that all trials start from, with the search's directory as `out`."""
    space: Space
    spec: RunSpec
    """Of a run of `config`."""
    book: TrialBook
    name: str
    """Name of the search on its cluster."""
    max_concurrent: int | None
    """Most trials at a time; None: as many as there is room for."""
    shown: TrialsShown
    view: ProgressView

    @property
    def own_teachers(self) -> bool:
        """True if trials differ in their teachers, so that each has its own."""
        return any(key.startswith("teacher.") for key in self.space.keys)

    @property
    def pool(self) -> str | None:
        """Name of the teacher pool that the trials share; None if they share none."""
        return None if self.own_teachers or not self.config.has_pool else POOL_PREFIX + self.name

    def run(self) -> None:
        """Joins a cluster or starts one, and returns when all trials have ended.

        Ends early, resumable, with KeyboardInterrupt or SystemExit after Ctrl-C or SIGTERM.
        """
        with ray_cluster():
            demand = demand_of(self.config, resolve(self.config.device, cluster_has_gpus()))
            check_capacity(demand)
            before = self.book.with_status("stopped")
            try:
                self._run_trials(demand)
            finally:
                for trial in sorted({*self.book.with_status("stopped")} - {*before}):
                    # Ray Tune ended its process, with what it had not passed on yet.
                    tell_stopped(self.book.run_dir(trial), self.view)

    def _run_trials(self, demand: Demand) -> None:
        """Keeps the shared teacher pool up while Ray Tune runs the trials."""
        config, pool, up = self.config, self.pool, Future[None]()

        def tell(error: Exception | None) -> None:
            if not up.done():
                up.set_exception(error) if error else up.set_result(None)

        together = replace(demand, max_workers=demand.max_workers * (self.max_concurrent or self.space.num_trials))
        with (
            stop_signals() as stop,
            ending_orphaned_cleaners(former_jobs(config.run_dir)),
            PoolKeeper(config, self.spec, together, pool, tell, self.view) if pool else nullcontext(),
        ):
            announce_cluster(config.run_dir, pool)  # now that a request to stop is heard
            spec, data = self.spec, None
            if config.data.order == "global":
                spec, data = prepare_for_run(config, spec, demand, RunContext(stop=stop), self.view)
                self.space.check(config.model_dump(mode="json"), spec.total_steps)
            if pool:
                wait_for_pool(up, stop)
            concurrent = self._concurrent(demand, spec)
            finished, stopped = self.book.with_status("finished"), frozenset(self.book.with_status("stopped"))
            self.view.say(f"{self.space.num_trials} trials, {concurrent} at a time, {len(finished)} finished before")
            job = SearchJob(
                config.run_dir,
                config.model_dump(mode="json"),
                spec.total_steps,
                pool,
                pool_spec(config, spec),
                data_spec(config),
                data,
                stopped,
                self.space.variants,
            )
            self._tune(job, concurrent, stop)
            if stop.requested:
                raise stop.end()

    def _concurrent(self, demand: Demand, spec: RunSpec) -> int:
        """Number of trials at a time. spec: of each run, which knows the data.

        Raises ClusterError if there is no room for one, or for their teacher's answers and the images that are sent to it.
        """
        room = room_for_trials(demand, self.own_teachers)
        concurrent = min(self.max_concurrent or room, room)
        if not concurrent:
            raise ClusterError(
                "the cluster has no room for a trial at present: other jobs hold what its nodes have; see `ray status`"
            )
        if self.pool:
            check_object_store(
                spec.payload_bytes,
                self.config.given_teacher,
                concurrent * demand.workers,
                image_bytes=spec.image_bytes,
            )
        return concurrent

    def _tune(self, job: SearchJob, concurrent: int, stop: StopRequest) -> None:
        """Returns when all trials have ended or, after a request to stop, those that ran."""
        stop_file = job.directory / STOP_FILE
        stop_file.unlink(missing_ok=True)
        tuner = self._tuner(job, concurrent, Watcher(self.book, stop, self.view))
        self.shown.begun = True

        def poll() -> None:
            self.view.wait_for(self.shown.activity())
            if stop.at_once:
                raise stop.end()
            if stop.requested and not stop_file.exists():
                self.view.say("stopping: the trials save a checkpoint after their step; once more to stop at once")
                stop_file.touch()

        try:
            run_in_thread(tuner.fit, poll)
        finally:
            stop_file.unlink(missing_ok=True)
            left_by_stopped_trials = job.directory.glob(f"{TRIALS}/*/{RAY_TRAIN_PREFIX}*")
            for left in (job.directory / SCRATCH, *left_by_stopped_trials):
                shutil.rmtree(left, ignore_errors=True)

    def _tuner(self, job: SearchJob, concurrent: int, watcher: Watcher) -> tune.Tuner:
        for name, value in {
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl has it all
            "RAY_AIR_NEW_OUTPUT": "0",  # no tables of its own
            "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # told by Watcher
            "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that is asked to stop may have nothing to report
        }.items():
            os.environ.setdefault(name, value)
        space, optuna = self.space, self.space.search == "optuna"
        book = self.book  # Ray Tune pickles what it is given, and `self` cannot be
        return tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, job=job), TRIAL_RESOURCES),
            param_space=None if optuna else sampled(space),
            tune_config=tune.TuneConfig(
                metric=space.metric,
                mode="min",
                num_samples=1 if space.search == "grid" else space.num_trials,
                max_concurrent_trials=concurrent if optuna else None,
                search_alg=searcher(space, book, concurrent),
                scheduler=scheduler(space, job.total_steps),
                trial_name_creator=lambda trial: book.assign_name(trial.config),
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=SCRATCH, storage_path=str(job.directory), verbose=0, callbacks=[watcher], stop=watcher.stopper()
            ),
        )


def former_jobs(directory: Path) -> set[str]:
    """The Ray jobs, as `driver.orphans.own_job` names them, of the drivers that this search's trials have had."""
    manifests = [read_manifest(path) for path in directory.glob(f"{TRIALS}/*/{RUN_FILE}")]
    return {job for manifest in manifests if manifest for job in jobs_of(manifest)}


def wait_for_pool(up: Future[None], stop: StopRequest) -> None:
    """Returns once the pool is up. Raises what it failed with, or the end that was requested meanwhile."""
    while not up.done():
        if stop.requested:
            raise stop.end()
        time.sleep(POOL_POLL_S)
    up.result()
