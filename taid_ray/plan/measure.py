"""`taid-ray plan --measure`: a few real steps of a configuration on what is here, and what they say about its rates."""

import math
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import DistillConfig, TeacherConfig, build_config
from taid_ray.data.batch import Batch, collate
from taid_ray.data.batching import num_micro_batches
from taid_ray.data.dataset import TrainingData
from taid_ray.distributed.capacity import Demand, check_capacity, demand_of
from taid_ray.distributed.cluster import cluster_has_gpus, ray_cluster
from taid_ray.distributed.device import resolve
from taid_ray.driver.launch import RunContext, run_distillation
from taid_ray.errors import ClusterError, ConfigError
from taid_ray.files import read_metrics
from taid_ray.models.pair import run_tokenizer
from taid_ray.plan.calibration import Measured
from taid_ray.plan.memory_watch import memory_watched
from taid_ray.plan.rates import Rates
from taid_ray.run.layout import METRICS_FILE
from taid_ray.student.spec import RunSpec
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.pool.lease import keep_lease
from taid_ray.teacher.pool.lifecycle import start_pool, stop_pool

WARM_UP, KEPT = 3, 8
"""Steps that are left out at the beginning, and those that count."""
MICRO_BATCHES = 2
"""Of each worker and step, at most."""
VALID_DOCUMENTS = 16
ROUND_TRIPS = 6
LARGEST_NOISE = 0.2
TRIP_S = 120.0


def measure(config: DistillConfig, console: Console, gpu: str | None = None, reduced: bool = False) -> Measured:
    """Makes the steps in a temporary run directory beside the configuration's own. Minutes.

    gpu: of --gpu. reduced: on one worker and one replica, which is what happens anyway where the configured layout does
    not fit. Raises ConfigError if --gpu contradicts what is here, else what `distill` raises.
    """
    config = with_absolute_paths(config)
    console.print("connecting to Ray" if os.environ.get("RAY_ADDRESS") else "starting Ray here", highlight=False)
    with ray_cluster():
        device = resolve(config.device, cluster_has_gpus())
        check_gpu(gpu, device)
        demand = demand_of(config, device)
        small = reduced or not _fits(demand)
        workers, replicas = (1, 1) if small else (demand.workers, max(1, demand.replicas))
        if config.teacher.mode != "pool":
            replicas = 1
        existing = next(path for path in config.run_dir.parents if path.exists())
        with tempfile.TemporaryDirectory(prefix=".taid-measure-", dir=existing) as directory:
            own = measuring_config(config, workers, replicas, Path(directory) / "run")
            console.print(
                f"measuring {own.train.steps} steps on {workers} worker(s)"
                + (f" and {replicas} teacher replica(s)" if config.teacher.mode == "pool" else ""),
                highlight=False,
            )
            return _measured(own, demand, console)


def check_gpu(gpu: str | None, device: str) -> None:
    """Raises ConfigError where --gpu names what is not here."""
    if gpu is not None and (gpu == "cpu") != (device == "cpu"):
        here = "runs on CPU cores" if device == "cpu" else "runs on GPUs"
        raise ConfigError(f"--gpu {gpu}: --measure {here} here; leave --gpu out, or plan without --measure")


def measuring_config(config: DistillConfig, workers: int, replicas: int, out: Path) -> DistillConfig:
    """The same work per micro-batch in few steps; nothing is validated on the way, saved or cached."""
    train = config.train
    each = math.ceil(train.batch_size / config.student.workers.min)
    accumulation = num_micro_batches(train.batch_size, train.micro_batch_size, config.student.workers.min)
    rows, micro = math.ceil(each / accumulation), min(accumulation, MICRO_BATCHES)
    values: dict[str, Any] = {
        "name": f"{config.name}-measure",
        "out": str(out),
        "student.workers": workers,
        "student.max_failures": 0,
        "train.steps": WARM_UP + KEPT + _tail(config.teacher.window, micro),
        "train.epochs": None,
        "train.batch_size": rows * micro * workers,
        "train.micro_batch_size": rows,
        "train.eval_every": 0,
        "train.warmup_steps": 0,
        "data.valid_documents": min(VALID_DOCUMENTS, config.data.valid_documents),
        "checkpoint": {"every_minutes": None},
        "tracking": {},
    }
    if config.teacher.mode == "pool":
        values["teacher.replicas"] = replicas
    if config.teacher.mode != "cache":
        values["cache"] = {}
    return build_config(config.model_dump(mode="json"), values=values)


def rates_of(
    lines: list[dict[str, Any]], config: DistillConfig, read_s: float, request_s: float
) -> tuple[Rates, float]:
    """(rates, seconds of a step) from the lines of metrics.jsonl of a measuring run, medians of the steps that count.

    read_s: of one row. request_s: of one request beside its computation.
    """
    workers = config.student.workers.min
    micro = num_micro_batches(config.train.batch_size, config.train.micro_batch_size, workers)
    kept = lines[WARM_UP : WARM_UP + KEPT]  # in those that follow the teacher runs out of work

    def median(name: str) -> float:
        return statistics.median(line[name] for line in kept)

    own = [sum(line[f"{phase}_s"] for phase in ("forward", "loss", "backward", "optimizer")) for line in kept]
    noise = statistics.stdev(map(math.log, own))
    if config.teacher.mode == "local":  # the wait is the computation
        teacher_s = median("teacher_wait_s") / micro
    else:
        teacher_s = median("teacher_compute_s") / (micro * workers)
    rates = Rates(
        measured=True,
        teacher_s=teacher_s,
        forward_s=median("forward_s") / micro,
        loss_s=median("loss_s") / micro,
        backward_s=median("backward_s") / micro,
        optimizer_s=median("optimizer_s"),
        read_s=read_s,
        data_s=median("data_s") / micro,
        request_s=request_s,
        noise=min(noise, LARGEST_NOISE),
    )
    return rates, median("step_s")


def _measured(config: DistillConfig, demand: Demand, console: Console) -> Measured:
    pool = f"taid-teacher-{config.name}-{uuid.uuid4().hex[:8]}"
    with _own_pool(config, demand, pool) as start, memory_watched(pool) as peaks:
        around = RunContext(console=console, pool=start if config.teacher.mode == "pool" else None)
        run_distillation(config, around)
        found = peaks()
        read_s, batch = _read(config)
        trips = [0.0]
        if config.teacher.mode == "pool":
            console.print("measuring round trips to the teacher", highlight=False)
            trips = ray.get(ray.remote(num_cpus=0)(round_trips).remote(pool, config.teacher, batch), timeout=TRIP_S)
    rates, step_s = rates_of(read_metrics(config.run_dir / METRICS_FILE), config, read_s, statistics.median(trips))
    return Measured(
        config=config,
        on_gpus=demand.device == "cuda",
        rates=rates,
        step_s=step_s,
        cores=_shared_cores(demand.device),
        worker_bytes=found.get("worker") if demand.device == "cpu" else None,
        replica_bytes=found.get("replica") if demand.device == "cpu" else None,
    )


@contextmanager
def _own_pool(config: DistillConfig, demand: Demand, name: str) -> Iterator[Callable[[DistillConfig, RunSpec], str]]:
    """Yields what starts the pool, which is still there after the run, for more questions."""
    stops: list[Callable[[], None]] = []

    def start(own: DistillConfig, plan: RunSpec) -> str:
        start_pool(own.teacher, plan.vocabulary.num_shared, demand.device, name, demand.teacher_role)
        stops.append(keep_lease(name))
        return name

    try:
        yield start
    finally:
        for stop in stops:
            stop()
            stop_pool(name)


def round_trips(pool: str, config: TeacherConfig, batch: Batch) -> list[float]:
    """Runs as a task. Seconds of some requests, one at a time, beside their computation; the first is left out."""
    client, found = PoolTeacher(pool, config), []
    for _ in range(ROUND_TRIPS):
        begin = time.perf_counter()
        output = client.collect(client.submit(batch))
        found.append(max(0.0, time.perf_counter() - begin - output.compute_s))
    client.close()
    return found[1:]


def _read(config: DistillConfig) -> tuple[float, Batch]:
    """Seconds of reading one row, and a micro-batch."""
    data = TrainingData(config.data, run_tokenizer(config), config.train.seed, config.train.batch_size)
    begin = time.perf_counter()
    rows = data.first_block() or next(data.batches())[0]
    return (time.perf_counter() - begin) / len(rows), collate(rows[: config.train.micro_batch_size])


def _fits(demand: Demand) -> bool:
    try:
        check_capacity(replace(demand, max_workers=demand.workers))
    except ClusterError:
        return False
    return True


def _tail(window: int, micro_batches: int) -> int:
    """Steps at the end in which no requests are left to send."""
    return math.ceil(window / micro_batches)


def _shared_cores(device: str) -> float | None:
    """Cores of the host that everything runs on; None where there are several, or GPUs compute."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    hosts = {node["NodeManagerHostname"] for node in nodes}
    return float(len(os.sched_getaffinity(0))) if device == "cpu" and hosts == {os.uname().nodename} else None
