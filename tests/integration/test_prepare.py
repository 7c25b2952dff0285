"""Preparing data with Ray: any number of tasks, some of them killed, make the same bytes; so do killed drivers and lost nodes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.store import spans
from taid_ray.driver.prepare import Preparation, prepare_data
from taid_ray.errors import DataError
from tests.support.harness import small_config
from tests.support.nodes import Nodes
from tests.support.paths import BUNDLE
from tests.support.processes import processes
from tests.support.store import prepare_here
from tests.support.waiting import START_S, wait_until

pytestmark = pytest.mark.timeout(600)
SHARED = 512
PARTS = 24


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver divides the data; the tasks take their parts as they come."""
    size = (BUNDLE / "tinystories_train.jsonl").stat().st_size
    monkeypatch.setattr(spans, "SPAN_BYTES", -(-size // PARTS))


def config_in(directory: Path, **data: str) -> DistillConfig:
    directory.mkdir(parents=True, exist_ok=True)
    tree = small_config("prepare", data={"store": str(directory)} | data) | {"out": str(directory / "run")}
    return build_config(tree)


def prepare(config: DistillConfig, said: list[str], cpus: float = 1.0) -> Path:
    return Path(prepare_data(config, SHARED, Preparation(said.append, lambda _: None, None, cpus)).sources[0].index)


def content(index: Path) -> dict[str, bytes]:
    """All files of a store but locks."""
    return {path.name: path.read_bytes() for path in index.parent.iterdir() if path.suffix != ".lock"}


def expected(config: DistillConfig) -> dict[str, bytes]:
    """The files of this data set when one process makes them, one after another."""
    index = Path(prepare_here(config).sources[0].index)
    names = {path.name.partition(".")[0] for path in index.parent.iterdir()}
    assert len(names) >= PARTS
    return content(index)


def test_a_task_that_is_killed_and_runs_that_share_a_store_make_the_bytes_of_one_process(
    ray_cluster: str, many_parts: None, tmp_path: Path
) -> None:
    config, said = config_in(tmp_path / "store"), list[str]()

    def kill_one() -> bool:
        """A process that prepares a part, or loads what that needs."""
        for process in processes("ray::encode"):
            with suppress(psutil.Error):  # it has ended
                process.kill()
                return True
        return False

    with ThreadPoolExecutor() as threads:
        runs = [threads.submit(prepare, config, said, cpus) for cpus in (1.0, 4.0)]
        wait_until(kill_one, "a task at work", START_S)
        indexes = {run.result() for run in runs}
    assert len(indexes) == 1
    (index,) = indexes
    assert content(index) == expected(config)
    assert sum("documents are" in line for line in said) == 2
    (damaged, *_) = index.parent.glob("[0-9a-f]*.arrow")
    damaged.write_bytes(damaged.read_bytes()[:-9] + bytes(9))
    assert prepare(config, said) == index and content(index) == expected(config)
    assert any(f"{damaged} is damaged; it is made anew" in line for line in said)


def test_what_is_wrong_with_a_document_is_said_as_one_process_says_it(ray_cluster: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "once"}\n' * 20 + '{"text": 3}\n')
    config = config_in(tmp_path / "store", train=str(data))
    with pytest.raises(DataError) as alone:
        prepare_here(config)
    with pytest.raises(DataError) as found:
        prepare(config, [])
    assert str(found.value) == str(alone.value) and str(data) in str(found.value)


def start_driver(directory: Path, store: Path) -> subprocess.Popen[bytes]:
    """`taid-ray data prepare`, into the store that is beside the run."""
    (directory / "config.yaml").write_text(yaml.safe_dump(small_config("prepare")))
    code = (
        f"from taid_ray.data.store import spans; spans.SPAN_BYTES = {spans.SPAN_BYTES};"
        "from taid_ray.cli.app import main; main()"
    )
    arguments = ["data", "prepare", str(directory / "config.yaml"), "--out", str(store.parent / "run")]
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def shards(store: Path) -> set[Path]:
    """What says of a shard that it is whole."""
    return {path for path in store.glob("*/*.json") if not path.name.startswith(("index", "blocks"))}


def check_finished(driver: subprocess.Popen[bytes], store: Path) -> None:
    """Waits until a driver has ended, with the bytes of one process in the store."""
    output = driver.communicate(timeout=START_S)[0].decode()
    assert driver.returncode == 0, output
    assert "documents" in output
    (index,) = store.glob("*/index-*.arrow")
    assert content(index) == expected(config_in(store))


@pytest.mark.more
def test_a_driver_that_is_killed_leaves_what_its_next_one_goes_on_from(
    ray_cluster: str, tmp_path: Path, many_parts: None
) -> None:
    store = tmp_path / "there" / "encoded-data"
    first = start_driver(tmp_path, store)
    wait_until(lambda: len(shards(store)) > 2, "some shards", START_S)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    made = {path: path.stat().st_mtime_ns for path in shards(store)}
    assert not list(store.glob("*/index-*"))
    check_finished(start_driver(tmp_path, store), store)
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A head that runs no task; drivers of this test join it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = Nodes(num_cpus=0)
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    try:
        yield found
    finally:
        found.close()


@pytest.mark.soak  # its own Ray cluster disturbs the one that other tests share
def test_a_node_that_is_lost_while_it_prepares_leaves_its_part_to_another(
    nodes: Nodes, tmp_path: Path, many_parts: None
) -> None:
    """The task on it is frozen in the middle of its part, and dies with the node; no shard that was there is made again."""
    lost, _ = nodes.add(), nodes.add()
    store = tmp_path / "there" / "encoded-data"
    driver = start_driver(tmp_path, store)

    def freeze() -> bool:
        for process in nodes.workers(lost):
            with suppress(psutil.Error):  # it has ended
                if "ray::encode" in " ".join(process.cmdline()):
                    process.suspend()
                    return True
        return False

    wait_until(lambda: len(shards(store)) > 2 and freeze(), "a task at work on the node", START_S)
    made = {path: path.stat().st_mtime_ns for path in shards(store)}
    assert len(made) < PARTS and not list(store.glob("*/index-*"))
    processes_there = nodes.workers(lost)
    nodes.lose(lost)
    for process in processes_there:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    check_finished(driver, store)
    assert {path: path.stat().st_mtime_ns for path in made} == made
