"""For all tests. Those that need Ray share one local cluster: it takes 10 s to start, a Serve or Train start 10 to 40 s more."""

import logging
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.process_group import process_group

# One thread each: the tests share two cores with Ray's processes, and sums come out the same on any machine.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Before Ray is imported anywhere: worker processes inherit these.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_AUTO_CONNECT="0",  # Serve's threads behind a handle outlive `ray.shutdown`, and would start another Ray
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_worker_niceness="0",  # 15 by default: beside anything else that computes, workers would starve
    HF_HUB_OFFLINE="1",
    PYTHONPATH=str(ROOT),  # drivers in processes of their own bring no runtime environment
)
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # rich and typer would write colours, also into pipes
    os.environ.pop(name, None)
if len(tempfile.gettempdir()) > 36:  # paths of sockets have at most 107 characters, and Ray's part of them up to 71
    os.environ.setdefault("RAY_TMPDIR", "/tmp")


@pytest.fixture(scope="session")
def one_process_group() -> Iterator[None]:
    """For tests that start DeepSpeed in the tests' own process. One group for all of them."""
    with process_group():
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of the cluster: 8 logical CPUs and 8 slots of each role, whatever the machine has."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=8,
        resources={"taid_teacher": 8, "taid_student": 8},
        object_store_memory=400 * 2**20,
        include_dashboard=True,
        logging_level="ERROR",
        log_to_driver=False,
    )
    # Ray's own helpers look for a running cluster; without this they could find a neighbour's.
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    yield os.environ["RAY_ADDRESS"]
    from ray import serve

    serve.shutdown()
    ray.shutdown()
    os.environ.pop("RAY_ADDRESS", None)
    # Threads of Serve live on and miss their Ray, which they would say into streams that pytest has closed by then, after
    # the summary that is to close the output.
    logging.raiseExceptions = False


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Where the time went, by folder, beside the slowest tests that `--durations` lists. Seconds of all processes together."""
    if config.getoption("durations") is None:
        return
    seconds: defaultdict[str, float] = defaultdict(float)
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = report.nodeid.partition("::")[0].rpartition("/")[0]
                seconds[folder] += report.duration
                tests[folder] += report.when == "call"
    terminalreporter.section("time by folder")
    for folder, spent in sorted(seconds.items(), key=lambda entry: -entry[1]):
        terminalreporter.write_line(f"{spent:7.1f} s  {tests[folder]:5d} tests  {folder}")
