"""The driver of a comparison: a search over methods and seeds, then evaluations of its students, then the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from taid_ray.compare import tasks
from taid_ray.compare.methods import SEED, check_comparable, comparison_space
from taid_ray.compare.page import write_report
from taid_ray.compare.results import EVALUATION_FILE, JUDGED, MEMORY_FILE, Comparison, read_comparison
from taid_ray.config.schema import DistillConfig, stored_config
from taid_ray.config.space import VARIANT, trial_config
from taid_ray.config.text import read_tree
from taid_ray.distributed.capacity import Demand, demand_of
from taid_ray.distributed.cluster import cluster_has_gpus, ray_cluster
from taid_ray.distributed.device import resolve
from taid_ray.driver.progress import ProgressView
from taid_ray.files import write_json
from taid_ray.report.search_results import Search
from taid_ray.run.directory import locked
from taid_ray.run.layout import SEARCH_FILE, TRIALS
from taid_ray.search.driver import run_search


@dataclass(frozen=True)
class CompareResult:
    """A comparison whose runs have all ended."""

    path: Path
    """Its directory, with comparison.html and comparison.json."""
    comparison: Comparison


def run_compare(
    config: DistillConfig,
    methods: Sequence[str],
    seeds: int = 3,
    out: str | Path | None = None,
    max_concurrent: int | None = None,
) -> CompareResult:
    """Trains a student with each method and seed, all else equal, evaluates them all, and returns when that is done.

    methods: names of METHODS. Methods of the same seed (train.seed, from the configuration's on) have the same data, order and
    first weights. out: the comparison's directory, by default runs/NAME-comparison; if it holds the same comparison, that
    goes on. max_concurrent: runs at a time, by default as many as the cluster has room for. Raises a TaidRayError for
    everything a user can put right.
    """
    check_comparable(config)
    space = comparison_space(config, methods, seeds)
    result = run_search(config, space, out or f"runs/{config.name}-comparison", max_concurrent)
    with locked(result.path), ProgressView() as view:
        Measuring(result.path, result.search, view).run()
        view.say("writing the report")
        comparison = read_comparison(result.path)
        write_report(comparison)
    return CompareResult(result.path, comparison)


class Measuring:
    """Measures what the runs of a comparison do not tell: their students, and the memory of each method."""

    def __init__(self, path: Path, search: Search, view: ProgressView):
        self._path, self._search, self._view = path, search, view
        self._config = stored_config(read_tree(path / SEARCH_FILE)["config"])

    def run(self) -> None:
        """Measures what is missing; joins Ray or starts it, if something is."""
        finished = [trial for trial in self._search.trials if trial.status == "finished"]
        students = [each.name for each in finished if not self._evaluation(each.name).exists()]
        known = read_comparison(self._path).memory
        methods = [method for method in self._search.space.variants if method not in known]
        if not students and not methods:
            return
        with ray_cluster():
            demand = demand_of(self._config, resolve(self._config.device, cluster_has_gpus()))
            self._evaluate(students, demand)
            self._measure_memory(methods, known, demand)

    def _evaluate(self, students: list[str], demand: Demand) -> None:
        """Evaluates the students of these trials, and leaves each one's figures in its directory."""
        task = ray.remote(tasks.evaluate).options(max_retries=tasks.TASK_RETRIES, **_resources(demand))
        settings = self._config.model_dump_json()
        started = {task.remote(settings, demand.device, str(self._path / TRIALS / name)): name for name in students}
        for name, found in tasks.results(started, "evaluation of trial", self._view):
            write_json(self._evaluation(name), found)
            figures = ", ".join(
                f"{figure.name} {found['mean'][figure.key]:.4f}" for figure in JUDGED if figure.key in found["mean"]
            )
            self._view.say(f"trial {name}: {figures} on {len(found['documents'])} held-out documents")

    def _measure_memory(self, methods: list[str], known: dict[str, int], demand: Demand) -> None:
        """Measures the memory of these methods, each in a process that ends with it."""
        task = ray.remote(max_calls=1)(tasks.peak_memory).options(
            max_retries=tasks.TASK_RETRIES, runtime_env={"env_vars": tasks.MALLOC}, **_resources(demand)
        )
        space, tree = self._search.space, self._config.model_dump(mode="json")
        seed = space.space[SEED].arguments[0]
        started = {}
        for method in methods:
            config = trial_config(tree, {VARIANT: method, SEED: seed}, None, space.variants)
            started[task.remote(config.model_dump_json(), demand.device)] = method
        for method, found in tasks.results(started, "memory of method", self._view):
            known[method] = found
            write_json(self._path / MEMORY_FILE, known)
            self._view.say(
                f"{method}: {found / 2**20:,.0f} MiB of memory in {tasks.MEMORY_STEPS} steps of one micro-batch"
            )

    def _evaluation(self, name: str) -> Path:
        return self._path / TRIALS / name / EVALUATION_FILE


def _resources(demand: Demand) -> dict[str, Any]:
    """Options of a Ray task with the resources of a student worker."""
    wanted = demand.worker_resources()
    return {"num_cpus": wanted.pop("CPU"), "num_gpus": wanted.pop("GPU", 0), "resources": wanted}
