"""Spans: together they hold every document of a file once, in its order, wherever the cuts fall."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taid_ray.config.data import DataSource
from taid_ray.data.reading.kinds import DataFile
from taid_ray.data.reading.rows import read_rows
from taid_ray.data.store import spans
from taid_ray.data.store.spans import Span, cut, documents_before, hash_content, read_documents, spans_of, without_first
from taid_ray.errors import DataError
from tests.support.store import data_file

NAMES = ["text"]
quickly = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def documents(found: list[Span]) -> list[Any]:
    return [row for span in found for row in read_documents(span, NAMES)]


@pytest.fixture(autouse=True)
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SPAN_BYTES", 24)


texts = st.text(st.sampled_from("ab é\u2028\u3000\U0001f600"), max_size=12)
ends = st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"])


@quickly
@given(st.lists(st.tuples(texts, ends), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_spans_of_json_lines(tmp_path: Path, lines: list[tuple[str, str]], mark: bool, open_end: bool) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text, end in lines)
    path = tmp_path / "d.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + (content.rstrip() if open_end else content).encode())
    found = cut(data_file(path))
    assert documents(found) == list(read_rows(data_file(path), NAMES)) == [{"text": text} for text, _ in lines]
    assert len(found) > 1 or len(lines) == 1 or path.stat().st_size <= 24


@quickly
@given(
    st.lists(st.tuples(texts, st.sampled_from(["\n", "\r\n", "\r", "\n\n"])), min_size=1, max_size=12), st.booleans()
)
def test_spans_of_text(tmp_path: Path, lines: list[tuple[str, str]], mark: bool) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + "".join(text + end for text, end in lines).encode())
    assert documents(cut(data_file(path))) == list(read_rows(data_file(path), NAMES))


def write_parquet(path: Path, rows: int, group: int) -> DataFile:
    table = pa.table({"text": [f"row {i}" for i in range(rows)], "other": list(range(rows))})
    pq.write_table(table, path, row_group_size=group)
    return data_file(path)


def test_spans_of_parquet_are_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "d.parquet", 100, 7)
    assert [(span.start, span.stop) for span in cut(file)] == [(i, i + 1) for i in range(15)]
    assert documents(cut(file)) == list(read_rows(file, NAMES))
    monkeypatch.setattr(spans, "SPAN_BYTES", 1000)
    assert 1 < len(cut(file)) < 15 and documents(cut(file)) == list(read_rows(file, NAMES))
    assert len({hash_content(span) for span in cut(file)}) == len(cut(file))


def write_arrow(path: Path, rows: int, group: int, form: Any = pa.ipc.new_stream, **extra: Any) -> DataFile:
    table = pa.table({"text": [f"row {i}" for i in range(rows)], "other": list(range(rows))} | extra)
    with form(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=group)
    return data_file(path)


@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("size", [24, 600, 10**6])
def test_spans_of_arrow_are_record_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any, size: int
) -> None:
    file = write_arrow(tmp_path / "d.arrow", 100, 7, form)
    monkeypatch.setattr(spans, "SPAN_BYTES", size)
    found = cut(file)
    assert {24: 15, 10**6: 1}.get(size, len(found)) == len(found) == len({hash_content(span) for span in found})
    assert documents(found) == list(read_rows(file, NAMES)) and len(documents(found)) == 100
    assert 1 < len(found) < 15 or size != 600
    skipped = without_first(found, 10, NAMES)
    assert documents(skipped) == [None] * 10 + documents(found)[10:]
    assert [documents_before(span, NAMES) for span in skipped] == [
        sum(len(documents([earlier])) for earlier in found[:number]) for number in range(len(found))
    ]
    content = file.path.read_bytes()
    file.path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises((OSError, ValueError)):
        documents(cut(file))


def test_arrow_with_dictionaries_is_one_span(tmp_path: Path) -> None:
    words = pa.array([f"word {i % 3}" for i in range(100)]).dictionary_encode()
    file = write_arrow(tmp_path / "d.arrow", 100, 7, word=words)
    (span,) = cut(file)
    assert span.part == "all" and len(documents([span])) == 100


def test_spans_of_a_data_set_of_the_hub_are_those_of_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in "ab":
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps({"text": f"{part} {i}"}) + "\n" for i in range(30)))
    names = {part: str(tmp_path / f"{part}.jsonl") for part in "ab"}

    def load(name: str, choice: Any, streaming: bool) -> Any:
        whole = "memory" not in name
        return datasets.load_dataset(
            "json", data_files=names, split=choice.split, cache_dir=str(tmp_path / "cache"), keep_in_memory=not whole
        )

    monkeypatch.setattr("taid_ray.data.documents.load_from_hub", load)
    texts = [{"text": f"{part} {i}"} for part in "ab" for i in range(30)]
    found = spans_of(DataSource(train="some/data", split="a+b", valid_documents=7))
    assert documents(found) == [None] * 7 + texts[7:] and len(found) > 1
    assert documents(spans_of(DataSource(train="some/data", split="b", valid="other"))) == texts[30:]
    for name, split, message in [
        (
            "some/data",
            "a[:10]",
            "it has 10 rows of the 30 in its files .* Name whole splits in data.split, or set data.order",
        ),
        ("some/memory", "a", "no files of it in the cache to encode; set data.order=blocks"),
    ]:
        with pytest.raises(DataError, match=rf"^data\.train: {name}: .*{message}"):
            spans_of(DataSource(train=name, split=split))


def test_what_cannot_be_cut_is_one_span(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.csv").write_text("text\n" + "".join(f'"row {i}"\n' for i in range(20)))
    (tmp_path / "d.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "e.json").write_text(json.dumps(rows, indent=1))
    for path in sorted(tmp_path.iterdir()):
        (span,) = cut(data_file(path))
        assert span.part == "all" and documents([span]) == rows, path


@pytest.mark.parametrize("skip", [0, 1, 6, 7, 8, 30, 99])
@pytest.mark.parametrize("name", ["d.jsonl", "d.txt", "d.parquet", "d.csv"])
def test_the_first_documents_are_left_out(tmp_path: Path, name: str, skip: int) -> None:
    path = tmp_path / name
    if name == "d.parquet":
        write_parquet(path, 30, 7)
    else:
        form = {"d.jsonl": '{{"text": "row {}"}}\n', "d.txt": "row {}\n", "d.csv": "row {}\n"}[name]
        path.write_text(("text\n" if name == "d.csv" else "") + "".join(form.format(i) for i in range(30)))
    found = without_first(cut(data_file(path)), skip, NAMES)
    expected = [{"text": f"row {i}"} if i >= skip else None for i in range(30)]
    assert documents(found) == expected
    assert sum(span.skip for span in found) == min(skip, 30)
    assert [documents_before(span, NAMES) for span in found] == [
        sum(len(documents([earlier])) for earlier in found[:number]) for number in range(len(found))
    ]


def test_a_damaged_line_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "one"}\n' * 30 + "{oops}\n" + '{"text": "one"}\n' * 30)
    with pytest.raises(ValueError, match="line 31, column 2"):
        documents(cut(data_file(path)))
    path = tmp_path / "d.txt"
    path.write_bytes(b"one line\n" * 30 + b"\xff\xfe\n")
    with pytest.raises(ValueError, match="line 31 is not utf-8 text"):
        documents(cut(data_file(path)))


def test_a_change_changes_only_the_spans_that_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": f"row {i:04}"}) + "\n" for i in range(200)]
    monkeypatch.setattr(spans, "SPAN_BYTES", 400)
    path.write_text("".join(lines))
    before = [hash_content(span) for span in cut(data_file(path))]
    lines[100] = lines[100].replace("row", "new")
    path.write_text("".join(lines))
    after = [hash_content(span) for span in cut(data_file(path))]
    assert len(before) == len({*before}) and sum(a != b for a, b in zip(before, after, strict=True)) == 1
