"""What every benchmark needs: facts about the machine, peak memory, a process of its own per variant, and the results."""

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from taid_ray.data.cursor import Cursor
from taid_ray.run.metrics import StepMetrics
from taid_ray.scheduler.aggregate import GO_ON, StepResult

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MIN_WIDTH = 130
"""Columns of a printed table where the output is no terminal."""


def machine() -> dict[str, Any]:
    """Facts that a figure means nothing without: hardware, versions, and when it was taken."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu_name = cpu.group(1) if cpu else platform.processor()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name,
        "cpu": cpu_name,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "ray", "deepspeed", "numpy")},
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


class PeakMemory:
    """`with PeakMemory() as memory: ...`, then `memory.bytes`: the most that this process held beyond what it held at
    entry, in bytes of resident memory (Linux). Children do not count."""

    bytes: int

    def __enter__(self) -> Self:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps would hide what is allocated next
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = max(0, _status_bytes("VmHWM") - self._before)


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls it in a new interpreter and returns its result or raises its error; memory and caches end with that.

    Function, arguments and result are pickled, so the function must stand at the top level of its module.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def local_ray(num_cpus: int, object_store_mib: int) -> Iterator[None]:
    """A Ray cluster of this machine alone, ended at exit. num_cpus: logical ones, whatever the machine has."""
    os.environ.update(  # before Ray is imported
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_niceness="0",  # Ray's 15 would let its own daemons go first where all share a few cores
    )
    import ray

    context = ray.init(
        address="local",
        num_cpus=num_cpus,
        resources={"taid_teacher": 1000, "taid_student": 1000},
        object_store_memory=object_store_mib * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]  # Serve and Train would look for another one
    try:
        yield
    finally:
        os.environ.pop("RAY_ADDRESS")
        ray.shutdown()


def write(name: str, result: dict[str, Any], tables: Sequence[Table]) -> None:
    """Prints the tables, and puts `result` with the machine's facts into benchmarks/results/NAME.json."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=MIN_WIDTH)
    for table in tables:
        console.print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), **result}, indent=1) + "\n")
    console.print(f"written to {path.relative_to(ROOT)}")


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # on a bare GPU machine, where the loss needs torch only
        return None


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


class StepLines:
    """Hooks of the training loop that keep each step's metrics, and the time at which it was done."""

    def __init__(self) -> None:
        self.metrics: list[StepMetrics] = []
        self.done_at: list[float] = []
        """Seconds of the monotonic clock."""

    def request(self, step: int) -> int:
        """Wants nothing."""
        return GO_ON

    def after_step(self, metrics: StepMetrics, result: StepResult, cursor: Cursor) -> None:
        """Keeps the line."""
        self.metrics.append(metrics)
        self.done_at.append(time.monotonic())
