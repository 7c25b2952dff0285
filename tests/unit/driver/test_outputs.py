"""Teacher outputs as a file: exporting them from a cache, and training from the file, without Ray."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from taid_ray.cli import cache as cache_commands
from taid_ray.cli.quickstart import BUNDLE
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.batch import collate
from taid_ray.data.fingerprint import changes
from taid_ray.driver.asked_rows import prepared_rows
from taid_ray.driver.cache_export import export_cache
from taid_ray.driver.cache_fill import fill_cache
from taid_ray.driver.outputs_import import import_outputs
from taid_ray.driver.preflight import prepare
from taid_ray.driver.progress import ProgressView
from taid_ray.errors import ConfigError, DataError, RunError, TeacherError
from taid_ray.student.spec import RunSpec
from taid_ray.teacher.cache import outputs
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.cache.claims import NoClaims
from taid_ray.teacher.cache.offline import OfflineTeacher
from taid_ray.teacher.cache.store import CacheStore
from taid_ray.teacher.wire import digest, pack
from tests.support.store import preparing_here

CPU = torch.device("cpu")
K = 8


@pytest.fixture(scope="module", autouse=True)
def without_ray() -> Iterator[None]:
    with preparing_here():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data, a filled cache and the file that was exported from it. Not to be changed."""
    path = tmp_path_factory.mktemp("outputs")
    lines = (BUNDLE / "tinystories_train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (path / "stories.jsonl").write_text("\n".join([*lines, lines[-1]]) + "\n", encoding="utf-8")
    settings = config(path, cache__directory=str(path / "cache"))
    fill_cache(settings)
    assert export_cache(settings, path / "outputs.parquet").samples > 12
    return path


def config(base: Path, **values: Any) -> DistillConfig:
    tree: dict[str, Any] = {
        "teacher": {"model": str(BUNDLE / "stories260k"), "dtype": "float32", "mode": "local"},
        "student": {"init": "scratch"},
        "data": {"train": str(base / "stories.jsonl"), "valid_documents": 4, "sequence_length": 64},
        "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 4},
    }
    topk = {"teacher.payload": "topk", "teacher.topk": K}
    return build_config(tree, values=topk | {key.replace("__", "."): value for key, value in values.items()})


def from_file(base: Path, directory: Path, file: Path | None = None, **values: Any) -> DistillConfig:
    mode = {"teacher__mode": "file", "teacher__outputs": str(file or base / "outputs.parquet")}
    return config(base, **mode | {"cache__directory": str(directory / "copied")} | values)


def begin(settings: DistillConfig) -> RunSpec:
    """What a run does before it starts Ray."""
    spec = prepare(settings)
    with ProgressView() as view:
        import_outputs(prepared_rows(settings, spec, view), view)
    return spec


def answers(settings: DistillConfig, spec: RunSpec) -> list[dict[str, torch.Tensor]]:
    """What the workers get for all rows of the data, five at a time."""
    fingerprint = (spec.fingerprint or {}).get("outputs", "")
    inner = OfflineTeacher(settings, spec.vocabulary.num_shared, fingerprint)
    teacher = CachedTeacher(inner, CacheStore(settings.cache, print), NoClaims(), CPU)
    with ProgressView() as view:
        rows = list(prepared_rows(settings, spec, view))
    try:
        return [teacher.collect(teacher.submit(collate(rows[i : i + 5]))).tensors for i in range(0, len(rows), 5)]
    finally:
        teacher.close()


def bits(tensors: dict[str, torch.Tensor]) -> str:
    return digest({name: pack(tensor) for name, tensor in tensors.items()})


def test_a_run_from_the_file_gets_the_bits_of_the_cache(base: Path, tmp_path: Path) -> None:
    cached = config(base, teacher__mode="cache", cache__directory=str(base / "cache"))
    filed = from_file(base, tmp_path)
    expected, found = answers(cached, prepare(cached)), answers(filed, begin(filed))
    assert len(expected) == len(found) > 2
    assert [bits(one) for one in expected] == [bits(one) for one in found]
    first, again = (list((tmp_path / "copied" / "samples").glob("??/*")) for _ in range(2))
    times = [path.stat().st_mtime_ns for path in first]
    begin(filed)
    assert [path.stat().st_mtime_ns for path in again] == times  # nothing is copied twice
    first[0].unlink()
    begin(filed)
    assert first[0].exists()


def test_the_exported_file_has_what_is_said(base: Path) -> None:
    table = pq.read_table(base / "outputs.parquet")
    assert table.schema.field("ids").type == pa.list_(pa.list_(pa.int32(), K))
    row = table.slice(0, 1).to_pylist()[0]
    assert (row["document"], row["split"], row["input_ids"][0]) == (1, "valid", 1)
    assert row["loss_positions"] == list(range(len(row["input_ids"]) - 1))
    assert set(table.column("split").to_pylist()) == {"train", "valid"}
    mass = np.exp(np.array(row["log_probs"])).sum(-1) + np.exp(row["log_tail"])
    assert np.allclose(mass, 1, atol=0.02)


def plain(base: Path) -> pa.Table:
    """The file as another tool may write it: needed columns only, likeliest ids first, other kinds of lists, no metadata."""
    rows = pq.read_table(base / "outputs.parquet").to_pylist()
    for row in rows:
        order = [np.argsort(logs)[::-1] for logs in row["log_probs"]]
        for name in ("ids", "log_probs"):
            row[name] = [[values[i] for i in ranks] for values, ranks in zip(row[name], order, strict=True)]
    kinds = {
        "input_ids": pa.large_list(pa.int64()),
        "ids": pa.large_list(pa.list_(pa.int64())),
        "log_probs": pa.list_(pa.large_list(pa.float64())),
    }
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()})


def test_a_file_of_another_tool_needs_three_columns(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(plain(base), tmp_path / "plain.parquet")
    cached = config(base, teacher__mode="cache", cache__directory=str(base / "cache"))
    filed = from_file(base, tmp_path, tmp_path / "plain.parquet")
    spec = begin(filed)
    assert "labels are not among the ids" in " ".join(capsys.readouterr().out.split())
    for expected, found in zip(answers(cached, prepare(cached)), answers(filed, spec), strict=True):
        assert torch.equal(expected["ids"], found["ids"]) and torch.equal(expected["log_probs"], found["log_probs"])
        torch.testing.assert_close(expected["log_tail"].exp(), found["log_tail"].exp(), atol=0.02, rtol=0)
    info = OfflineTeacher(filed, spec.vocabulary.num_shared, (spec.fingerprint or {})["outputs"])
    assert 0 < info.payload_error(collate([])) < 1


def message(settings: DistillConfig) -> str:
    with pytest.raises(DataError) as caught:
        begin(settings)
    return str(caught.value)


def test_samples_that_the_file_lacks_are_said_before_the_start(base: Path, tmp_path: Path) -> None:
    whole = pq.read_table(base / "outputs.parquet")
    pq.write_table(whole.filter(pa.compute.not_equal(whole.column("document"), 7)), tmp_path / "lacks.parquet")
    told = message(from_file(base, tmp_path, tmp_path / "lacks.parquet"))
    assert re.search(
        r"no outputs for \d of the \d+ samples of the data. The first of them is of document 7 of data.train", told
    )
    longer = message(from_file(base, tmp_path, data__sequence_length=96))
    assert "ends after the first 64 of its tokens: see data.sequence_length" in longer
    story = '{"text": "Once upon a time there was a zebra with a very long telescope."}\n'
    (tmp_path / "other.jsonl").write_text(story * 2)
    other = message(from_file(base, tmp_path, data__train=str(tmp_path / "other.jsonl"), data__valid_documents=1))
    assert "document 1 of data.train" in other and "and then comes" in other and "data.chat_template" in other


def test_another_content_of_the_file_is_another_teacher(base: Path, tmp_path: Path) -> None:
    before = prepare(from_file(base, tmp_path)).fingerprint
    table = pq.read_table(base / "outputs.parquet")
    pq.write_table(table.slice(1), tmp_path / "other.parquet")
    now = prepare(from_file(base, tmp_path, tmp_path / "other.parquet")).fingerprint
    assert before and now and changes(before, before) == []
    assert changes(before, now) == ["teacher.outputs: the content of the file has changed"]


def test_what_cannot_be_exported_leaves_no_file(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    shutil.copytree(base / "cache", tmp_path / "cache")
    settings = config(base, cache__directory=str(tmp_path / "cache"))
    lost = list((tmp_path / "cache" / "samples").glob("*/*.safetensors"))[:2]
    for path in lost:
        path.unlink()
    with pytest.raises(
        ConfigError, match=r"lacks the outputs of [234] of the data's \d+ samples; run `taid-ray cache warm`"
    ):
        export_cache(settings, out)
    with pytest.raises(ConfigError, match=r"payload: hidden cannot be exported.*teacher.payload=topk"):
        export_cache(config(base, teacher__payload="hidden", cache__directory=str(base / "cache")), out)
    with pytest.raises(ConfigError, match=r"data\.images_column: .* cannot be exported"):
        export_cache(config(base, cache__directory="c", data__format="chat", data__images_column="images"), out)
    with pytest.raises(ConfigError, match="exists already"):
        export_cache(settings, base / "stories.jsonl")
    with pytest.raises(ConfigError, match=r"teacher.mode: file has all outputs"):
        export_cache(from_file(base, tmp_path), out)
    assert not list(tmp_path.glob("*.parquet*")) and not list(tmp_path.glob(".*"))


def test_a_sample_that_left_the_cache_is_said_in_the_workers(base: Path, tmp_path: Path) -> None:
    settings = from_file(base, tmp_path)
    spec = begin(settings)
    shutil.rmtree(tmp_path / "copied" / "samples")
    with pytest.raises(TeacherError, match=r"mode: file: \d+ sample\(s\).*give the same command again"):
        answers(settings, spec)
    shutil.rmtree(tmp_path / "copied" / "teachers")
    with pytest.raises(ConfigError, match=r"holds no record of the outputs in teacher.outputs"):
        answers(settings, spec)


def test_the_file_is_written_in_groups(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "GROUP_BYTES", 20_000)
    settings = config(base, cache__directory=str(base / "cache"))
    export_cache(settings, tmp_path / "groups.parquet")
    assert pq.ParquetFile(tmp_path / "groups.parquet").num_row_groups > 5
    assert pq.read_table(tmp_path / "groups.parquet").equals(pq.read_table(base / "outputs.parquet"))
    (tmp_path / ".taken.parquet.tmp").mkdir()
    with pytest.raises(RunError, match=r"taken.parquet cannot be written"):
        export_cache(settings, tmp_path / "taken.parquet")


def test_a_full_cache_is_said_at_the_start(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache.disk_gib: 0.0001 is too small"):
        begin(from_file(base, tmp_path, cache__disk_gib=0.0001))
    (tmp_path / "copied").mkdir()
    (tmp_path / "copied" / "samples").write_text("no directory")
    with pytest.raises(RunError, match=r"cache.directory does not take the outputs"):
        begin(from_file(base, tmp_path))


def test_the_command_says_what_it_wrote(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config(base, cache__directory=str(base / "cache")).model_dump_json())
    out = str(tmp_path / "out.parquet")
    result = CliRunner().invoke(cache_commands.app, ["export", str(path), out], catch_exceptions=False)
    assert f"file     {out}\n" in result.output and f"ids      {K} of 512 per position\n" in result.output
    assert (tmp_path / "out.parquet").read_bytes() == (base / "outputs.parquet").read_bytes()
