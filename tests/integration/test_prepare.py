"""Preparing data with Ray: any number of tasks, some of them killed, make the same bytes; so do a killed driver and its next."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
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
    return Path(prepare_data(config, SHARED, Preparation(said.append, lambda _: None, None, cpus)).index)


def content(index: Path) -> dict[str, bytes]:
    """All files of a store but locks."""
    return {path.name: path.read_bytes() for path in index.parent.iterdir() if path.suffix != ".lock"}


def expected(config: DistillConfig) -> dict[str, bytes]:
    """The files of this data set when one process makes them, one after another."""
    index = Path(prepare_here(config).index)
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


@pytest.mark.more
def test_a_driver_that_is_killed_leaves_what_its_next_one_goes_on_from(
    ray_cluster: str, tmp_path: Path, many_parts: None
) -> None:
    def driver(store: Path) -> Callable[[], subprocess.Popen[bytes]]:
        config = small_config("prepare")  # whose store is beside the run
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        code = (
            f"from taid_ray.data.store import spans; spans.SPAN_BYTES = {spans.SPAN_BYTES};"
            "from taid_ray.cli.app import main; main()"
        )
        command = [
            sys.executable,
            "-c",
            code,
            "data",
            "prepare",
            str(tmp_path / "config.yaml"),
            "--out",
            str(store.parent / "run"),
        ]
        return lambda: subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    store = tmp_path / "there" / "encoded-data"
    start = driver(store)
    first = start()

    def shards() -> set[Path]:
        return {path for path in store.glob("*/*.json") if not path.name.startswith(("index", "blocks"))}

    wait_until(lambda: len(shards()) > 2, "some shards", START_S)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    made = {path: path.stat().st_mtime_ns for path in shards()}
    assert not list(store.glob("*/index-*"))
    second = start()
    output = second.communicate(timeout=START_S)[0].decode()
    assert second.returncode == 0, output
    assert "documents" in output
    assert {path: path.stat().st_mtime_ns for path in made} == made
    (index,) = store.glob("*/index-*.arrow")
    assert content(index) == expected(config_in(store))
