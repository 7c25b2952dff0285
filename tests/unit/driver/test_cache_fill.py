"""Filling a cache, and training without a teacher: everything but Ray."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from taid_ray.cli import cache as cache_commands
from taid_ray.cli.quickstart import BUNDLE
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.batch import Batch, collate
from taid_ray.data.dataset import TrainingData, validation_rows
from taid_ray.driver import asked_rows, cache_fill
from taid_ray.driver.asked_rows import Amount, AskedRows, prepared_rows
from taid_ray.driver.cache_export import export_cache
from taid_ray.driver.preflight import prepare
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.signals import StopRequest
from taid_ray.errors import ConfigError, TaidRayError, TeacherError
from taid_ray.models.pair import model_configs, run_tokenizer, shared_vocabulary
from taid_ray.teacher.cache import store
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.cache.claims import NoClaims
from taid_ray.teacher.cache.offline import OfflineTeacher, all_records, find_record
from taid_ray.teacher.cache.samples import samples_of_row
from taid_ray.teacher.cache.store import CacheStore
from taid_ray.teacher.local import LocalTeacher
from tests.support.store import preparing_here

CPU = torch.device("cpu")
DOCUMENTS = 40


@pytest.fixture(scope="module", autouse=True)
def without_ray() -> Iterator[None]:
    with preparing_here():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (BUNDLE / "tinystories_train.jsonl").read_text(encoding="utf-8").splitlines()[:DOCUMENTS]
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(data: Path, directory: Path, **values: Any) -> DistillConfig:
    tree: dict[str, Any] = {
        "teacher": {"model": str(BUNDLE / "stories260k"), "dtype": "float32", "mode": "local"},
        "student": {"init": "scratch"},
        "data": {"train": str(data), "valid_documents": 8, "sequence_length": 128, "block_documents": 16},
        "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 4},
        "cache": {"directory": str(directory)},
    }
    return build_config(tree, values={key.replace("__", "."): value for key, value in values.items()})


def num_shared(settings: DistillConfig) -> int:
    return shared_vocabulary(settings, *model_configs(settings)).num_shared


def reader(settings: DistillConfig) -> CachedTeacher:
    """As a worker of a run without a teacher has it."""
    inner = OfflineTeacher(settings, num_shared(settings))
    return CachedTeacher(inner, CacheStore(settings.cache, print), NoClaims(), CPU)


def batches(settings: DistillConfig, size: int = 5, seed: int = 3) -> list[Batch]:
    """Validation, and all training rows in another order and other batches than they were computed in."""
    tokenizer = run_tokenizer(settings)
    rows = validation_rows(settings.data.sources[0], tokenizer)
    for more, cursor in TrainingData(settings.data.sources[0], tokenizer, seed, 1).batches():
        if cursor.epoch:
            break
        rows += more
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


@pytest.fixture(scope="module")
def filled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of payload hidden. Not to be changed."""
    directory = tmp_path_factory.mktemp("filled") / "cache"
    done = cache_fill.fill_cache(config(data, directory))
    assert done.computed > DOCUMENTS and done.teacher_tokens > 0 and done.directory == str(directory)
    return directory


@pytest.fixture
def copy(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "copy"))


def test_a_filled_cache_answers_as_the_teacher(data: Path, filled: Path) -> None:
    settings = config(data, filled, teacher__mode="cache")
    prepare(settings)
    local, cached = LocalTeacher(settings.teacher, num_shared(settings), CPU), reader(settings)
    assert cached.info() == local.info()
    assert torch.equal(cached.head().weight, local.head().weight)
    for batch in batches(settings):
        expected = local.collect(local.submit(batch)).tensors["hidden"]
        torch.testing.assert_close(cached.collect(cached.submit(batch)).tensors["hidden"], expected, rtol=0, atol=2e-5)
    assert cached.tokens == 0
    cached.close()


def asked(settings: DistillConfig) -> AskedRows:
    with ProgressView() as view:
        return prepared_rows(settings, prepare(settings), view)


def samples(rows: AskedRows) -> Counter[tuple[str, int]]:
    """Every sample, by its key and the number of its document."""
    return Counter((sample.key, document) for row in rows for sample, document in samples_of_row(row, "teacher"))


@pytest.mark.parametrize("pack", [True, False])
def test_stored_rows_hold_the_samples_of_encoded_ones_each_once(
    pack: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = asked(config(data, tmp_path, data__order="blocks", data__pack=pack))
    expected = samples(encoded)
    stored = asked(config(data, tmp_path, data__pack=pack))
    monkeypatch.setattr(asked_rows, "TrainingData", lambda *_, **__: pytest.fail("encoded in the driver"))
    monkeypatch.setattr(asked_rows, "CHUNK_ROWS", 3)
    found = samples(stored)
    assert found == expected and set(found.values()) == {1} and len(found) > DOCUMENTS
    assert samples(stored) == found  # again, from the beginning
    rows = list(stored)
    held_out = validation_rows(stored.config.data.sources[0], run_tokenizer(stored.config))
    assert [row.input_ids.tolist() for row in rows[: len(held_out)]] == [row.input_ids.tolist() for row in held_out]
    assert len(held_out) == stored.spec.data.valid_rows
    counted = Amount(len(rows), sum(row.num_loss_tokens for row in rows), sum(row.num_samples for row in rows))
    assert stored.amount() == counted and counted.samples == len(found)


def test_the_teacher_is_asked_for_stored_rows_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(data, tmp_path / "cache")
    expected = len(samples(asked(settings)))
    monkeypatch.setattr(asked_rows, "TrainingData", lambda *_, **__: pytest.fail("encoded in the driver"))
    done = cache_fill.fill_cache(settings)
    assert (done.computed, done.found) == (expected, 0)


def test_sft_asks_for_the_rows_of_validation_only(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path, loss__name="sft")
    rows = asked(settings)
    assert rows.data is None and len(list(rows)) == rows.amount().rows == rows.spec.data.valid_rows


def test_a_wish_to_stop_ends_the_reading(data: Path, tmp_path: Path) -> None:
    rows = asked(config(data, tmp_path))
    stop = StopRequest(cause=15, times=1)
    with pytest.raises(SystemExit):
        list(AskedRows(rows.config, rows.spec, rows.data, stop))


@pytest.mark.parametrize("command", [cache_fill.fill_cache, lambda alone: export_cache(alone, Path("o.parquet"))])
def test_without_a_teacher_there_is_nothing_to_keep(command: Any, data: Path, tmp_path: Path) -> None:
    changes = {"student__model": str(BUNDLE / "stories260k"), "loss__name": "sft", "cache__directory": None}
    with pytest.raises(ConfigError, match=r"^teacher is null, .* teacher\.model$"):
        command(config(data, tmp_path, teacher=None, **changes))


def test_filling_again_computes_nothing_but_what_is_damaged(data: Path, copy: Path) -> None:
    settings = config(data, copy, train__seed=5, train__micro_batch_size=3)
    again = cache_fill.fill_cache(settings)
    assert (again.computed, again.teacher_tokens) == (0, 0) and again.found > DOCUMENTS
    damaged = sorted((copy / "samples").glob("*/*.safetensors"))[:2]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    assert cache_fill.fill_cache(settings).computed == 2


@pytest.mark.parametrize("payload", ["topk", "hidden_int8"])
def test_approximate_payloads_keep_their_error(data: Path, tmp_path: Path, payload: str) -> None:
    settings = config(data, tmp_path / "cache", teacher__payload=payload, teacher__topk=8)
    cache_fill.fill_cache(settings)
    local, cached = LocalTeacher(settings.teacher, num_shared(settings), CPU), reader(settings)
    first = collate(validation_rows(settings.data.sources[0], run_tokenizer(settings))[:4])
    assert cached.payload_error(first) == local.payload_error(first) > 0
    found, expected = cached.collect(cached.submit(first)).tensors, local.collect(local.submit(first)).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    cached.close()


def test_a_missing_sample_is_said(data: Path, copy: Path) -> None:
    settings = config(data, copy, teacher__mode="cache")
    for path in (copy / "samples").glob("*/*.safetensors"):
        path.unlink()
    cached = reader(settings)
    request = cached.submit(batches(settings)[0])
    with pytest.raises(
        TeacherError,
        match=rf"\d+ sample\(s\) of a batch are not in the cache {re.escape(str(copy))}; run `taid-ray cache",
    ):
        cached.collect(request)
    cached.close()


def refusal(settings: DistillConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(settings)
    return str(caught.value)


def test_other_settings_are_refused_before_anything_starts(data: Path, filled: Path, tmp_path: Path) -> None:
    for values in ({"teacher__payload": "topk"}, {"teacher__dtype": "bfloat16"}):
        message = refusal(config(data, filled, teacher__mode="cache", **values))
        assert "holds no outputs of teacher.model" in message and "taid-ray cache warm" in message
    message = refusal(config(data, tmp_path / "empty", teacher__mode="cache"))
    assert str(tmp_path / "empty") in message and "taid-ray cache warm" in message


def teacher_copy(path: Path) -> Path:
    return Path(shutil.copytree(BUNDLE / "stories260k", path))


def test_weights_are_not_needed_and_other_ones_are_refused(data: Path, filled: Path, tmp_path: Path) -> None:
    moved = teacher_copy(tmp_path / "moved")
    settings = config(data, filled, teacher__mode="cache", teacher__model=str(moved))
    prepare(settings)
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (moved / "model.safetensors").write_bytes(content)
    assert "are others than those" in refusal(settings)
    (moved / "model.safetensors").unlink()
    prepare(settings)
    assert find_record(settings, num_shared(settings))[1].model == str(BUNDLE / "stories260k")


def test_without_weights_two_like_teachers_are_told_apart_by_name(data: Path, copy: Path, tmp_path: Path) -> None:
    first, other = all_records(copy)[0][0], copy / "teachers" / ("0" * 64)
    shutil.copytree(first, other)
    record = json.loads((other / "teacher.json").read_text())
    record["info"]["fingerprint"], record["model"] = "0" * 64, "another"
    (other / "teacher.json").write_text(json.dumps(record))
    (copy / "teachers" / "damaged").mkdir()
    (copy / "teachers" / "damaged" / "teacher.json").write_text("{")
    bare = teacher_copy(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert "holds no outputs" in refusal(config(data, copy, teacher__mode="cache", teacher__model=str(bare)))
    record["model"] = str(bare)
    (other / "teacher.json").write_text(json.dumps(record))
    settings = config(data, copy, teacher__mode="cache", teacher__model=str(bare))
    assert find_record(settings, num_shared(settings))[0] == other


def test_a_damaged_head_is_said(data: Path, copy: Path) -> None:
    settings = config(data, copy, teacher__mode="cache")
    (path,) = copy.glob("teachers/*/head.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    for bad in (bytes(content), content[:50], b""):
        path.write_bytes(bad)
        with pytest.raises(TeacherError, match=r"head in .* is damaged or missing; run `taid-ray cache warm`"):
            OfflineTeacher(settings, num_shared(settings)).head()


def test_what_does_not_fit_is_refused_before_the_teacher_starts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_fill, "running_teacher", lambda *_: pytest.fail("started"))
    with pytest.raises(ConfigError, match=r"cache.disk_gib: 0.001 is too small .* set cache.disk_gib=0.0"):
        cache_fill.fill_cache(config(data, tmp_path / "cache", cache__disk_gib=0.001))
    with pytest.raises(ConfigError, match=r"cache.directory is not set"):
        cache_fill.fill_cache(config(data, tmp_path, cache__directory=None))


def test_what_is_said_to_be_enough_is_enough(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        cache_fill.fill_cache(config(data, tmp_path / "cache", cache__disk_gib=1e-6))
    enough = float(str(caught.value).split("set cache.disk_gib=")[1].split(",")[0])
    settings = config(data, tmp_path / "cache", cache__disk_gib=enough)
    assert cache_fill.fill_cache(settings).computed and cache_fill.fill_cache(settings).computed == 0


def test_of_a_stream_the_steps_of_the_run_are_computed(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "cache", data__streaming=True)
    rows = len(validation_rows(settings.data.sources[0], run_tokenizer(settings)))
    assert cache_fill.fill_cache(settings).rows == rows + 4 * 4


def test_a_cache_whose_lock_another_process_holds_is_not_pruned(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_S", 0.1)
    with (
        FileLock(copy / "samples" / "lock"),
        pytest.raises(ConfigError, match=r"cannot be emptied \(another process holds"),
    ):
        cache_commands.prune(copy, 0)


def test_stats_and_prune(copy: Path, tmp_path: Path) -> None:
    def invoke(*arguments: str) -> str:
        narrow = {"COLUMNS": "40"}  # where a table would break the paths
        result = CliRunner().invoke(cache_commands.app, list(arguments), env=narrow, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    count = len(list(copy.glob("samples/*/*.safetensors")))
    shown = invoke("stats", str(copy))
    assert (
        f"cache    {copy}\nsamples  {count}\n" in shown
        and f"{BUNDLE / 'stories260k'}, payload hidden, float32 (" in shown
    )
    assert invoke("prune", str(copy), "--max-gib", "1") == "0 samples removed\n"
    assert invoke("prune", str(copy), "--max-gib", "0") == f"{count} samples removed\n"
    assert not list(copy.glob("samples/*/*.safetensors")) and not (copy / "teachers").exists()
    assert "samples" in invoke("stats", str(copy))
    with pytest.raises(TaidRayError, match="holds no cache of teacher outputs"):
        invoke("stats", str(tmp_path))
