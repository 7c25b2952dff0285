"""Spans: together they hold every document of a file once, in its order, wherever the cuts fall."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taid_ray.data.reading.kinds import DataFile
from taid_ray.data.reading.rows import read_rows
from taid_ray.data.store import spans
from taid_ray.data.store.spans import Span, cut, documents_before, hash_content, read_documents, without_first
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
