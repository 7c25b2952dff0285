"""The fingerprint of data: what counts as the same, and what is said of what does not."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from taid_ray.config.data import DataSource
from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.data.documents import open_documents
from taid_ray.data.fingerprint import Fingerprint, changes, check_outline, fingerprint, rows_digest
from taid_ray.data.reading.hub import HubDocuments
from taid_ray.errors import DataError


def lines(*words: str) -> str:
    return "".join(json.dumps({"text": word}) + "\n" for word in words)


def taken(path: Path, valid: Path | None = None, streaming: bool = False) -> Fingerprint:
    config = DataSource(train=str(path), valid=valid and str(valid), streaming=streaming)
    found = fingerprint(open_documents(config, "train"), valid and open_documents(config, "valid"))
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text(lines("one", "two"))
    (tmp_path / "data/b.jsonl").write_text(lines("three"))
    return tmp_path / "data"


def test_moved_and_renamed_data_are_the_same(root: Path, tmp_path: Path) -> None:
    before = taken(root, root / "b.jsonl")
    assert before["train"]["files"][0] | {"digest": ""} == {
        "name": "a.jsonl", "kind": "json", "bytes": 32, "digest": "", "rows": 2,
    }  # fmt: skip
    moved = root.rename(tmp_path / "elsewhere")
    (moved / "b.jsonl").rename(moved / "c.jsonl")
    assert changes(before, taken(moved, moved / "c.jsonl")) == []


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a row more": (
        lambda d: (d / "a.jsonl").write_text(lines("one", "two", "x")),
        "a.jsonl has changed (2 rows then, 3 rows now)",
    ),
    "another word": (lambda d: (d / "a.jsonl").write_text(lines("one", "twx")), "a.jsonl has changed"),
    "a file less": (lambda d: (d / "b.jsonl").unlink(), "b.jsonl is gone"),
    "a file more": (lambda d: (d / "c.jsonl").write_text(lines("x")), "c.jsonl is new"),
    "order": (lambda d: (d / "a.jsonl").rename(d / "c.jsonl"), "a.jsonl is gone, c.jsonl is new"),
    "the other way round": (
        lambda d: ((d / "a.jsonl").rename(d / "x"), (d / "b.jsonl").rename(d / "a.jsonl"), (d / "x").rename(d / "b.jsonl")),
        "a.jsonl has changed (2 rows then, 1 row now), b.jsonl has changed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_has_changed_is_said(root: Path, case: str) -> None:
    change, said = CHANGES[case]
    before = taken(root)
    change(root)
    (found,) = changes(before, taken(root))
    assert found.startswith(f"data.train: {said}")
    assert len(changes(taken(root, next(root.iterdir())), before)) == 2  # data.valid is gone, too


def test_of_a_stream_only_names_and_sizes_are_known(root: Path) -> None:
    before = taken(root, streaming=True)
    (root / "a.jsonl").write_text(lines("one", "twx"))
    assert changes(before, taken(root, streaming=True)) == []
    (root / "a.jsonl").write_text(lines("one", "twox"))
    assert changes(before, taken(root, streaming=True)) == [
        "data.train: a.jsonl has changed (32 bytes then, 33 bytes now)"
    ]


def test_a_worker_must_find_the_files_of_the_driver(root: Path) -> None:
    found = taken(root)
    documents = open_documents(DataSource(train=str(root)), "train")
    check_outline(found, 0, documents, "data.train")
    mixed = {"sources": [{"train": {"files": []}}, found], "valid": None}
    check_outline(mixed, 1, documents, "data.train[1].path")
    (root / "b.jsonl").write_text(lines("three", "four"))
    with pytest.raises(
        DataError, match=r"data\.train: node .* does not find .*: b\.jsonl has changed \(18 bytes then, 35 bytes"
    ):
        check_outline(found, 0, documents, "data.train")
    with pytest.raises(DataError, match=r"data\.train\[1\]\.path: node .* does not find"):
        check_outline(mixed, 1, documents, "data.train[1].path")


def test_changes_of_sources_are_told_by_their_keys(root: Path) -> None:
    before = {"sources": [taken(root), taken(root, valid=str(root))], "valid": None, "rows": "r", "index": "i"}
    assert changes(before, before) == [] == changes(json.loads(json.dumps(before)), before)
    (root / "b.jsonl").write_text(lines("three", "four"))
    changed = "b.jsonl has changed (1 row then, 2 rows now)"
    now = before | {"sources": [before["sources"][0], taken(root, valid=str(root))]}
    assert changes(before, now) == [f"data.train[1].path: {changed}", f"data.train[1].valid: {changed}"]
    assert changes(before, before | {"sources": before["sources"][:1]}) == [
        "data.train: a list of 2 sources then, a list of 1 source now"
    ]
    assert changes(taken(root), before) == ["data.train: one source then, a list of 2 sources now"]
    assert "tokenizer" in changes(before, before | {"index": "other"})[0]


def test_data_of_the_hub_are_known_by_what_is_read() -> None:
    one, other = (datasets.Dataset.from_dict({"text": [word], "id": [word]}) for word in ("one", "other"))
    more = datasets.Dataset.from_dict({"text": ["one"], "id": [7]})
    config = DataSource(train="some/data")
    found = [
        fingerprint(HubDocuments(rows, "data.train: some/data", config), None)
        for rows in (one, more, other, one.to_iterable_dataset())
    ]
    assert changes(found[0], found[1]) == []
    assert HubDocuments(one, "data.train: some/data", config).description() == [
        "data.train: some/data: 1 row of a data set of the hub"
    ]
    one.info.builder_name = "json"
    assert "guesses the types of columns in json files" in HubDocuments(one, "data.train: x", config).description()[1]
    for changed in found[2:]:
        (said,) = changes(found[0], changed)
        assert said.startswith("data.train: then hub some/data, digest ")


def test_the_hash_of_rows_covers_what_is_trained() -> None:
    rows = [Row([5, 6, 7], [0, 1, 2], [6, NO_LABEL, NO_LABEL]), Row([8], [0], [NO_LABEL])]
    digest = rows_digest(rows)
    assert digest == rows_digest(list(rows))
    others = [
        Row([5, 9, 7], [0, 1, 2], [6, NO_LABEL, NO_LABEL]),
        Row([5, 6, 7], [0, 1, 0], [6, NO_LABEL, NO_LABEL]),
        Row([5, 6, 7], [0, 1, 2], [6, 7, NO_LABEL]),
    ]
    assert all(rows_digest([other, rows[1]]) != digest for other in others)
    assert rows_digest(rows[::-1]) != digest != rows_digest(rows[:1])
