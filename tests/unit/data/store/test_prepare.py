"""Preparing spans: what is stored is what the plain way makes of the documents, whoever makes it, however often they die."""

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taid_ray import storage
from taid_ray.config.data import DataSource
from taid_ray.data.batch import NO_LABEL
from taid_ray.data.encoding import Encoder
from taid_ray.data.packing import to_rows
from taid_ray.data.store import prepare, sealed
from taid_ray.data.store.prepare import Encoding, check_columns, prepare_span
from taid_ray.data.store.shard import ShardFacts
from taid_ray.data.store.spans import Span, cut, read_documents, spans_of, without_first
from taid_ray.errors import DataError, RunError
from tests.support.store import data_file, story

FORK = multiprocessing.get_context("fork")
Prepared = Callable[[], list[ShardFacts]]


def contents(store: Path) -> dict[str, str]:
    """Every file of the store, with a hash of its bytes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in store.iterdir()}


def table_of(store: Path, facts: ShardFacts) -> list[dict[str, Any]]:
    """The rows of a shard, as any program reads an Arrow file."""
    rows: list[dict[str, Any]] = pa.ipc.open_file(store / f"{facts.digest}.arrow").read_all().to_pylist()
    return rows


def test_a_shard_holds_what_the_plain_way_makes_of_its_documents(
    stories: list[Span], encoding: Encoding, store: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "WINDOW_TOKENS", 10**9)
    stories[:] = without_first(stories, 5, ["text"])
    assert len(stories) > 3
    for span, facts in zip(stories, prepared(), strict=True):
        documents = [row["text"] for row in read_documents(span, ["text"]) if row is not None]
        samples = Encoder(encoding.config, encoding.tokenizer, "data").encode({"text": documents}, span.skip)
        rows = to_rows(samples, 64, True)
        found = table_of(store, facts)
        assert [row["input_ids"] for row in found] == [row.input_ids.tolist() for row in rows]
        assert [row["documents"] for row in found] == [list(row.documents) for row in rows]
        for stored, row in zip(found, rows, strict=True):
            assert stored["starts"] == [i for i, position in enumerate(row.position_ids.tolist()) if position == 0]
            assert stored["loss_mask"] == [target != NO_LABEL for target in row.targets.tolist()]
            assert stored["media"] is None
        assert facts.rows == len(rows) and facts.tokens == sum(len(row.input_ids) for row in rows)
        assert facts.loss_tokens == sum(row.num_loss_tokens for row in rows)
        assert facts.highest_id == max(int(row.input_ids.max()) for row in rows)
        assert facts.documents == len(documents) + span.skip and facts.counts["documents"] == len(documents)
        assert facts.columns == ["text"]


def test_packing_goes_on_in_windows(store: Path, prepared: Prepared) -> None:
    for facts in prepared():
        assert len(facts.blocks) > 1 and facts.rows == len(table_of(store, facts))
        assert {n for row in table_of(store, facts) for n in row["documents"]} == {*range(facts.documents)}


def prepare_in(store: Path, encoding: Encoding, span: Span) -> ShardFacts | None:
    return prepare_span(span, encoding, store, print)


def test_one_task_and_eight_make_the_same_bytes(
    stories: list[Span], encoding: Encoding, store: Path, prepared: Prepared
) -> None:
    alone = prepared()
    other = store.with_name("other")
    other.mkdir()
    with ProcessPoolExecutor(8, mp_context=FORK) as pool:
        together = list(pool.map(partial(prepare_in, other, encoding), reversed(stories)))
    assert together == alone[::-1]
    assert contents(other) == contents(store) and len(contents(store)) == 2 * len(stories)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_until(death: str, store: Path, encoding: Encoding, stories: list[Span]) -> None:
    """Prepares spans in a process of its own that dies where `death` says, in the second shard or later."""
    made = 0

    def counted(call: Callable[..., Any], deadly: int, *arguments: Any) -> Any:
        nonlocal made
        made += 1
        return die() if made == deadly else call(*arguments)

    if death == "between two blocks":
        prepare.to_record_batch = partial(counted, prepare.to_record_batch, 4)
    elif death == "before the name":
        sealed.digest_of = partial(counted, sealed.digest_of, 2)
    else:
        sealed.write_json = partial(counted, sealed.write_json, 2)
    for span in stories:
        prepare_span(span, encoding, store, print)


@pytest.mark.parametrize("death", ["between two blocks", "before the name", "before the facts"])
def test_killed_while_writing_and_resumed_to_the_same_bytes(
    death: str, stories: list[Span], encoding: Encoding, store: Path, prepared: Prepared
) -> None:
    prepared()
    other = store.with_name("other")
    other.mkdir()
    child = FORK.Process(target=make_until, args=(death, other, encoding, stories))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = contents(other)
    assert 0 < sum(name.endswith(".json") for name in left) < len(stories)
    assert contents(store).items() >= {(n, x) for n, x in left.items() if n.endswith(".json")}
    for span in stories:
        prepare_span(span, encoding, other, print)
    assert contents(other) == contents(store)


def test_a_second_time_nothing_is_encoded(prepared: Prepared, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, before = prepared(), {path: path.stat().st_mtime_ns for path in store.iterdir()}
    monkeypatch.setattr(prepare, "Encoder", None)
    assert prepared() == first
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == before


def test_a_span_that_another_process_makes_is_left_to_it(
    stories: list[Span], encoding: Encoding, store: Path, prepared: Prepared
) -> None:
    digest = prepared()[1].digest
    for path in store.glob(f"{digest}.*"):
        path.unlink()
    with FileLock(store / f"{digest}.lock"):
        assert [prepare_span(span, encoding, store, print) is None for span in stories[:3]] == [False, True, False]
    assert prepare_span(stories[1], encoding, store, print) is not None
    assert not list(store.glob("*.lock"))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a byte": lambda path: path.write_bytes(path.read_bytes()[:500] + b"?" + path.read_bytes()[501:]),
    "its end": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "all of it": lambda path: path.unlink(),
    "half the facts": lambda path: path.with_suffix(".json").write_text('{"tokens": 3'),
    "other facts": lambda path: path.with_suffix(".json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_found_and_made_anew(
    damage: str, stories: list[Span], encoding: Encoding, store: Path, prepared: Prepared
) -> None:
    facts, before = prepared(), contents(store)
    path = store / f"{facts[2].digest}.arrow"
    DAMAGES[damage](path)
    assert contents(store) != before
    said: list[str] = []
    assert [prepare_span(span, encoding, store, said.append) for span in stories] == facts
    assert contents(store) == before
    assert said == [f"{path} is damaged"]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ending=st.sampled_from([".arrow", ".json"]),
    where=st.floats(0, 0.999),
    change=st.integers(1, 255),
    cut_off=st.booleans(),
)
def test_any_damage_is_found(
    ending: str, where: float, change: int, cut_off: bool, stories: list[Span], encoding: Encoding, store: Path
) -> None:
    """One byte is changed, or the file ends there. JSON may stay the same with other white space."""
    for path in store.iterdir():
        path.unlink()  # what the example before may have left with other white space
    facts = prepare_span(stories[0], encoding, store, print)
    assert facts is not None
    before, path = contents(store), store / f"{facts.digest}{ending}"
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    content[at] ^= change
    path.write_bytes(content[:at] if cut_off else content)
    assert prepare_span(stories[0], encoding, store, print) == facts
    assert contents(store) == before or (ending == ".json" and json.loads(path.read_bytes())["digest"] == facts.digest)


def test_what_is_kept_for_validation_makes_another_shard(
    stories: list[Span], encoding: Encoding, store: Path, prepared: Prepared
) -> None:
    first = prepared()
    stories[:] = without_first(stories, 3, ["text"])
    second = prepared()
    assert first[0] != second[0] and first[1:] == second[1:]
    assert {n for row in table_of(store, second[0]) for n in row["documents"]} == {*range(3, second[0].documents)}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"sequence_length": 65}, False),
        ({"pack": False}, False),
        ({"text_column": "story"}, False),
        ({"train": "elsewhere", "valid": "v.jsonl", "valid_documents": 7, "split": "test", "block_documents": 9}, True),
    ],
)
def test_the_key_is_that_of_the_rows(change: dict[str, Any], same: bool, encoding: Encoding) -> None:
    other = replace(encoding, config=encoding.config.model_copy(update=change))
    assert (other.key == encoding.key) == same and len(encoding.key) == 16


def test_the_key_knows_template_and_tokenizer(stories_tokenizer: Any, tmp_path: Path) -> None:
    config = DataSource(train="d.jsonl", format="chat", chat_template="{{ messages }}")
    key = Encoding(config, stories_tokenizer).key
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    moved = config.model_copy(update={"chat_template": str(tmp_path / "t.jinja")})
    assert Encoding(moved, stories_tokenizer).key == key
    (tmp_path / "t.jinja").write_text("{{ messages }}.")
    assert Encoding(moved, stories_tokenizer).key != key
    assert (
        Encoding(DataSource(train="d"), stories_tokenizer).key == Encoding(DataSource(train="d"), stories_tokenizer).key
    )


@pytest.mark.parametrize("template", ["{{ messages }}", "{{ strftime_now('%d') }}{{ messages }}"])
def test_the_key_knows_the_day_if_the_template_may_write_it(template: str, stories_tokenizer: Any) -> None:
    config = DataSource(train="d.jsonl", format="chat", chat_template=template)
    days = [config.model_copy(update={"date": day}) for day in ("2026-01-02", "2026-01-03")]
    keys = {Encoding(each, stories_tokenizer).key for each in days}
    assert len(keys) == (2 if "strftime_now" in template else 1)


@pytest.mark.parametrize("number", [2, 60])
def test_a_bad_document_is_named_by_its_number_in_the_file(
    number: int, stories: list[Span], encoding: Encoding, store: Path
) -> None:
    path = stories[0].file.path
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps({"text": number})
    path.write_text("\n\n".join(lines))
    with pytest.raises(DataError, match=rf"^data\.train: {path}: row {number} of column 'text' holds int {number}"):
        for span in cut(stories[0].file):
            prepare_span(span, encoding, store, print)
    assert not list(store.glob("*.tmp"))


def test_a_damaged_file_is_named(stories: list[Span], encoding: Encoding, store: Path) -> None:
    path = stories[0].file.path
    path.write_text(path.read_text() + "{oops}\n")
    with pytest.raises(DataError, match=rf"^data\.train: {path} cannot be read as json\. Repair .*line 98, column 2"):
        for span in cut(stories[0].file):
            prepare_span(span, encoding, store, print)


def test_a_file_that_changes_meanwhile_is_refused(
    stories: list[Span], encoding: Encoding, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: Encoder, *arguments: Any) -> Any:
        with stories[0].file.path.open("a") as file:
            file.write('{"text": "late"}\n')
        return plain(self, *arguments)

    plain = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(DataError, match="was changed while it was read"):
        prepare_span(stories[0], encoding, store, print)
    assert not list(store.glob("*.json"))


def test_a_full_disk_is_said(
    stories: list[Span], encoding: Encoding, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealed.os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot be written \(.*No space left.*make room there"):
        prepare_span(stories[0], encoding, store, print)
    assert not list(store.glob("*.tmp"))


def test_a_file_without_a_column_is_found(tmp_path: Path, stories_tokenizer: Any, store: Path) -> None:
    """Of a column that some documents may leave out, when all of the file were seen."""
    config = DataSource(train="d", format="prompt_response", prompt_columns=["prompt", "context"])
    encoding = Encoding(config, stories_tokenizer)

    def prepared(contexts: list[int]) -> None:
        rows: list[dict[str, str]] = [{"prompt": "The cat", "response": "sat."} for _ in range(200)]
        for number in contexts:
            rows[number]["context"] = "On the mat"
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = cut(data_file(path))
        assert len(found) > 2
        check_columns(found, [facts for span in found if (facts := prepare_in(store, encoding, span))], encoding)

    prepared([150])
    with pytest.raises(
        DataError, match=r"d\.jsonl has no column 'context' \(it has: prompt, response\)\. Set data\.prompt"
    ):
        prepared([])


def test_a_span_without_rows(tmp_path: Path, encoding: Encoding, store: Path, stories: list[Span]) -> None:
    (nothing,) = without_first(stories[:1], 10**6, ["text"])
    facts = prepare_span(nothing, encoding, store, print)
    assert facts is not None and (facts.rows, facts.tokens, facts.highest_id) == (0, 0, -1)
    assert facts.documents == nothing.skip and table_of(store, facts) == []


def test_a_file_that_this_node_does_not_see_is_said(stories: list[Span], encoding: Encoding, store: Path) -> None:
    stories[0].file.path.unlink()
    with pytest.raises(DataError, match=r"data\.train: .*stories\.jsonl is not found on node .*HF_HOME"):
        prepare_span(stories[0], encoding, store, print)


def prepared_parquet(
    root: Path, encoding: Encoding, tables: dict[str, dict[str, Any]], **settings: Any
) -> list[ShardFacts]:
    """Writes one file per table, and prepares them all in a store beside them."""
    (root / "data").mkdir()
    (root / "store").mkdir()
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), root / "data" / f"{name}.parquet", row_group_size=1)
    config = DataSource(train=str(root / "data"), valid="other", sequence_length=64, **settings)
    encoding = Encoding(config, encoding.tokenizer)
    spans = spans_of(config)
    found = [prepare_span(span, encoding, root / "store", print) for span in spans]
    shards = [facts for facts in found if facts is not None]
    check_columns(spans, shards, encoding)
    return shards


def test_parquet_files_may_have_other_columns_and_types(tmp_path: Path, encoding: Encoding) -> None:
    """The same conversation gives the same tokens, whatever the types that hold it and the columns around it."""

    def messages(kind: Any, *names: str) -> Any:
        text = pa.large_string() if kind is pa.large_list else pa.string()
        talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the dog"}]
        return pa.array([talk, talk], kind(pa.struct([(name, text) for name in names])))

    parts = pa.StructArray.from_arrays(
        [pa.array(["human", "gpt"] * 2), pa.array(["the cat", "the dog"] * 2)], ["from", "value"]
    )
    tables: dict[str, dict[str, Any]] = {
        "a": {"messages": messages(pa.list_, "role", "content")},
        "b": {
            "id": [1, 2],
            "messages": messages(pa.large_list, "content", "role", "name"),
            "tools": pa.array(["[]", None]).dictionary_encode(),
        },
        "c": {"conversations": pa.ListArray.from_arrays([0, 2, 4], parts), "system": pa.nulls(2)},
        "d": {"messages": messages(pa.list_, "role", "content")[:0], "tools": pa.array([], pa.list_(pa.string()))},
    }
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    shards = prepared_parquet(tmp_path, encoding, tables, format="chat", chat_template=template)
    assert sum(shard.documents for shard in shards) == 6
    rows = [row for shard in shards for row in table_of(tmp_path / "store", shard)]
    assert len({str(row["input_ids"]) for row in rows}) == 1 and all(any(row["loss_mask"]) for row in rows)


def test_a_parquet_file_without_a_needed_column_is_named(tmp_path: Path, encoding: Encoding) -> None:
    with pytest.raises(DataError, match=r"b\.parquet has no column 'text' \(it has: body\)\. Set data\.text_column"):
        prepared_parquet(tmp_path, encoding, {"a": {"text": ["the cat"]}, "b": {"body": ["the dog"]}})


def test_a_prompt_column_may_be_absent_from_a_file(tmp_path: Path, encoding: Encoding) -> None:
    whole = {"prompt": ["the"], "more": ["big"], "response": ["cat"]}
    tables = {"a": whole, "b": {"prompt": ["the"], "response": ["dog"]}}
    settings: dict[str, Any] = {"format": "prompt_response", "prompt_columns": ["prompt", "more"]}
    assert len(prepared_parquet(tmp_path, encoding, tables, **settings)) == 2


def test_source_files_on_storage_that_fails_half_of_the_reads(
    tmp_path: Path, encoding: Encoding, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of every kind that is not memory-mapped: hashed, divided, and encoded as if nothing had happened."""
    texts, data = [story(number) for number in range(60)], tmp_path / "data"
    data.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (data / "a.jsonl").write_text(lines)
    (data / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (data / "c.txt").write_text("\n".join(texts))
    (data / "d.csv").write_text("text\n" + "\n".join(texts).replace(",", ";"))
    pq.write_table(pa.table({"text": texts}), data / "e.parquet", row_group_size=10)
    names = sorted(path.name for path in data.iterdir())

    def made(directory: Path) -> dict[str, str]:
        directory.mkdir(exist_ok=True)
        for name in names:
            for span in spans_of(encoding.config.model_copy(update={"train": str(data / name), "valid_documents": 7})):
                assert prepare_span(span, encoding, directory, print)
        return contents(directory)

    expected, plain, draw = made(store), os.preadv, random.Random(0)
    failed = []

    def preadv(*arguments: Any) -> int:
        if draw.random() < 0.5:
            failed.append(arguments)
            raise OSError(5, "Input/output error")
        return plain(*arguments)

    monkeypatch.setattr(storage, "PAUSE_S", 0.0)
    monkeypatch.setattr(os, "preadv", preadv)
    assert made(tmp_path / "again") == expected and len(failed) > 50
    monkeypatch.setattr(storage, "TRIES", 3)
    draw.random = lambda: 0.0  # type: ignore[method-assign]
    failing = r"data\.train: .*a\.jsonl cannot be read. Check the disk or the network .*Input/output error"
    with pytest.raises(DataError, match=failing):
        made(tmp_path / "again")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), PermissionError(13, "forbidden")])
def test_source_files_that_are_missing_or_forbidden_are_refused_at_once(
    error: OSError, stories: list[Span], encoding: Encoding, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Any, *arguments: Any) -> int:
        if path == stories[0].file.path:
            raise error
        return plain(path, *arguments)

    plain = os.open
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(DataError, match=f"stories.jsonl cannot be read as json.*{error.strerror}"):
        prepare_span(stories[0], encoding, store, print)
    assert not list(store.glob("*.arrow"))
