"""Rows with images in the store; and that text has the keys and the bytes there that it had before there were any images."""

import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from taid_ray.config.data import DataSource
from taid_ray.data.batch import Row
from taid_ray.data.encoding import Encoder
from taid_ray.data.images import EncoderMedia
from taid_ray.data.packing import to_rows
from taid_ray.data.reading.kinds import digest_of
from taid_ray.data.store import prepare
from taid_ray.data.store.assemble import assemble
from taid_ray.data.store.index import Index, write_index
from taid_ray.data.store.prepare import Encoding, prepare_span
from taid_ray.data.store.reader import StoredRows
from taid_ray.data.store.remote import Location
from taid_ray.data.store.shard import ShardFacts
from taid_ray.data.store.spans import cut
from taid_ray.errors import DataError
from taid_ray.media.reader import ImageReader
from tests.support.chats import chat_tokenizer
from tests.support.images import StubTokens, picture, vision_tokenizer
from tests.support.store import data_file, story

TOKENIZER = vision_tokenizer()
TOKENS = StubTokens(TOKENIZER)
PICTURES = [picture((4 + number, 8), shade=number) for number in range(7)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(marks: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "<image>" * marks + "?"}, {"role": "assistant", "content": answer}]


def rows(count: int, image: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Rows with no, one and three images in turn."""
    numbers = [[], [0], [1, 2, 3]]
    return [
        {
            "messages": talk(len(numbers[n % 3]), f"answer {n}"),
            "images": [image((n + number) % len(PICTURES)) for number in numbers[n % 3]],
        }
        for n in range(count)
    ]


def source_of(path: Path, **settings: Any) -> DataSource:
    given = {"format": "chat", "images_column": "images", "sequence_length": 256, "valid_documents": 1}
    return DataSource(train=str(path), **given | settings)


def prepared(path: Path, store: Location, **settings: Any) -> tuple[list[Row], Index, list[ShardFacts]]:
    """Prepares a file, and reads all rows of the store."""
    encoding = Encoding(source_of(path, **settings), TOKENIZER, TOKENS)
    spans = cut(data_file(path))
    shards = [facts for span in spans if (facts := prepare_span(span, encoding, store, print))]
    made = assemble(encoding, spans, shards, store, 1 << 20, print)
    index = made.opened
    return StoredRows([index], [made.images_directory]).read(np.arange(index.totals.rows)), index, shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for number, content in enumerate(PICTURES):
            (tmp_path / "pictures" / f"{number}.png").write_bytes(content)
            archive.writestr(f"{number}.png", content)
    return tmp_path


@pytest.fixture
def named(folder: Path) -> Path:
    """A file whose rows name their images."""
    path = folder / "named.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(40, lambda number: f"{number}.png")))
    return path


@pytest.fixture
def embedded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of two spans, whose rows hold their images."""
    monkeypatch.setattr("taid_ray.data.store.spans.SPAN_BYTES", 1000)
    path = folder / "embedded.parquet"
    table = pa.Table.from_pylist(rows(40, lambda number: {"bytes": PICTURES[number], "path": f"{number}.png"}))
    pq.write_table(table, path, row_group_size=20)
    return path


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("images", ["pictures", "pictures.zip", "embedded"])
def test_rows_come_back_with_images_that_can_be_read(
    images: str, pack: bool, folder: Path, named: Path, embedded: Path, store: Path
) -> None:
    where = None if images == "embedded" else str(folder / images)
    path = embedded if where is None else named
    found, index, shards = prepared(path, store, images_directory=where, pack=pack)

    reader = ImageReader()
    numbers = [[(n + k) % 7 for k in [[], [0], [1, 2, 3]][n % 3]] for n in range(40)]
    for row in found:
        contents = [reader.read(image) for image in row.images]
        assert contents == [PICTURES[k] for document in row.documents for k in numbers[document - 1]]
        for image in row.images:
            own = TOKENS.layout(image.width, image.height).ids
            assert np.array_equal(row.input_ids[image.start : image.start + image.tokens], own)
    assert sorted(document for row in found for document in row.documents) == list(range(1, 41))

    used = [PICTURES[k] for document in numbers for k in document]
    totals = index.totals.media
    assert totals is not None and (totals["images"], totals["image_bytes"]) == (len(used), sum(map(len, used)))
    assert totals["largest_row_images"] == max(len(row.images) for row in found)
    assert totals["largest_row_image_bytes"] == max(
        sum(len(reader.read(image)) for image in row.images) for row in found
    )
    assert index.totals.counts["images"] == len(used) and "bad_images" not in index.totals.counts
    packs = list(store.glob("*-images.pack"))
    assert len(packs) == (len(shards) if images == "embedded" else 0)
    assert sum(pack.stat().st_size for pack in packs) <= len(packs) * sum(map(len, PICTURES))  # each image once
    assert not list(store.glob("*.tmp"))


def test_rows_are_those_of_the_encoder(named: Path, folder: Path, store: Path) -> None:
    found, _, shards = prepared(named, store, images_directory=str(folder / "pictures"), pack=False)
    config = source_of(named, images_directory=str(folder / "pictures"), pack=False)
    encoder = Encoder(config, TOKENIZER, "data", EncoderMedia(TOKENS))
    lines = [json.loads(line) for line in named.read_text().splitlines()]
    columns = {name: [line.get(name) for line in lines] for name in ("messages", "tools", "system", "images")}
    expected = to_rows(encoder.encode(columns, 1), 256, False)
    for row, other in zip(found, expected, strict=True):
        places = [image.place.removeprefix(f"file:{folder}/pictures/") for image in row.images]
        assert places == [image.place.removeprefix("file:") for image in other.images]
        assert replace(row, images=()) == replace(other, images=())
    assert not any(shard.media["packed"] for shard in shards if shard.media)


def test_moved_images_are_found_and_replaced_ones_make_another_index(named: Path, folder: Path, store: Path) -> None:
    _, index, _ = prepared(named, store, images_directory=str(folder / "pictures"))
    (folder / "pictures").rename(folder / "elsewhere")
    after, same, _ = prepared(named, store, images_directory=str(folder / "elsewhere"))
    assert index.totals == same.totals and len(list(store.glob("index-*.json"))) == 1
    image = next(image for row in after for image in row.images)
    assert image.place.startswith(f"file:{folder}/elsewhere/") and ImageReader().read(image)

    shards = set(store.glob("*.arrow"))
    contents = {path: path.read_bytes() for path in shards}
    (folder / "elsewhere" / "0.png").write_bytes(picture((9, 8), shade=99))
    os.utime(folder / "elsewhere" / "1.png", (1, 1))  # another time, but the same
    changed, other, _ = prepared(named, store, images_directory=str(folder / "elsewhere"))
    assert other.totals.digest != index.totals.digest and set(store.glob("*.arrow")) > shards
    assert contents == {path: path.read_bytes() for path in shards}  # which another run may be reading
    reader = ImageReader()
    assert all(reader.read(image) for row in changed for image in row.images)
    assert (9, 8) in {(image.width, image.height) for row in changed for image in row.images}

    (folder / "elsewhere" / "0.png").write_bytes(PICTURES[0])
    again, first, _ = prepared(named, store, images_directory=str(folder / "elsewhere"))
    assert first.totals == index.totals and again == after


def test_an_image_that_was_missing_is_noticed_when_it_is_there(named: Path, folder: Path, store: Path) -> None:
    (folder / "pictures" / "0.png").rename(folder / "0.png")
    settings = {"images_directory": str(folder / "pictures"), "bad_images": "drop"}
    _, without, _ = prepared(named, store, **settings)
    (folder / "0.png").rename(folder / "pictures" / "0.png")
    _, whole, _ = prepared(named, store, **settings)
    assert without.totals.counts["bad_images"] > 0 and "bad_images" not in whole.totals.counts
    (folder / "pictures" / "0.png").unlink()
    with pytest.raises(DataError, match=r"row \d+: image \d \(0\.png\) is missing"):
        prepared(named, store, images_directory=str(folder / "pictures"))


def test_a_pack_that_is_gone_or_damaged_is_made_anew(embedded: Path, store: Path) -> None:
    before, _, shards = prepared(embedded, store)
    packs = sorted(store.glob("*-images.pack"))
    contents = [pack.read_bytes() for pack in packs]
    packs[0].unlink()
    packs[1].write_bytes(b"x" + contents[1][1:])
    after, _, again = prepared(embedded, store)
    assert [pack.read_bytes() for pack in packs] == contents and (before, shards) == (after, again)


def test_errors_name_the_row_in_the_file_and_nothing_is_left(
    embedded: Path, named: Path, folder: Path, store: Path
) -> None:
    table = pq.read_table(embedded).to_pylist()
    table[31]["images"][0] = {"bytes": b"no picture", "path": "x.png"}
    pq.write_table(pa.Table.from_pylist(table), embedded, row_group_size=20)
    with pytest.raises(DataError, match=r"row 32: image 1 \(x\.png\) is no picture"):
        prepared(embedded, store)
    assert not list(store.glob("*.tmp"))
    _, index, shards = prepared(embedded, store, bad_images="drop")
    assert (index.totals.counts["dropped"], index.totals.counts["bad_images"]) == (1, 1)
    said = [shard.media["bad"] for shard in shards if shard.media]
    assert said[0] == "" and f"in {embedded} (row_groups 1 to 2), row 12: image 1 (x.png) is no picture" in said[1]
    with pytest.raises(DataError, match=r"named\.jsonl has no image: no row has one in the column 'photos'"):
        text = [{"messages": talk(0, "a")}]
        named.write_text("".join(json.dumps(row) + "\n" for row in text))
        prepared(named, store, images_column="photos")


@pytest.mark.parametrize(
    ("settings", "key", "digests"),
    [
        (
            {},
            "0ae94db0ba9d9d3c",
            (
                "c3b2e7459bbed42e55c45a87300e6487",
                "2bea4c47126b1c6e3e4880d843cf15f7",
                "d9c830b0d3e775b199901bd9cd97bdb9",
            ),
        ),
        (
            {"format": "chat", "chat_template": CHATML, "sequence_length": 512},
            "b7efb31161137025",
            (
                "e9bf3aad8274f24b500208c120dc3dd1",
                "60131d5e0ab263cf4aa41593f62ea4c0",
                "2614f13eb5404914d6f7882375bee15a",
            ),
        ),
    ],
)
def test_text_keeps_its_keys_and_bytes(
    settings: dict[str, Any],
    key: str,
    digests: tuple[str, ...],
    stories_tokenizer: Any,
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hashes of what was written before the store knew images."""
    monkeypatch.setattr("taid_ray.data.store.spans.SPAN_BYTES", 1 << 20)
    path = tmp_path / "stories.jsonl"
    lines = [
        {
            "text": story(n),
            "messages": [{"role": "user", "content": "tell a story"}, {"role": "assistant", "content": story(n)}],
        }
        for n in range(97)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoding = Encoding(DataSource(train="stories.jsonl", **{"sequence_length": 64} | settings), stories_tokenizer)
    (span,) = cut(data_file(path))
    facts = prepare_span(span, encoding, store, print)
    assert facts is not None and encoding.key == key
    index = Path(write_index(store, [facts], print))
    files = [store / f"{facts.digest}.arrow", store / f"{facts.digest}.json", index.with_suffix(".json")]
    assert tuple(map(digest_of, files)) == digests


def test_a_run_with_images_has_keys_of_its_own() -> None:
    text = DataSource(train="x", format="chat", chat_template=CHATML)
    other = text.model_copy(update={"bad_images": "drop", "max_image_pixels": 5, "images_directory": "elsewhere"})
    keys = {Encoding(config, chat_tokenizer()).key for config in (text, other)}
    assert len(keys) == 1  # what no text depends on
    keys |= {Encoding(config, TOKENIZER, TOKENS).key for config in (text, other, source_of(Path("x")))}
    assert len(keys) == 4


def test_nodes_copy_packs_from_remote_storage(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for node in ("a", "b"):
        (tmp_path / node).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / node))
        found.append(prepared(embedded, "memory://bucket/images")[0])
        monkeypatch.setattr(prepare, "_ShardMaker", lambda *_: pytest.fail("encoded again"))
    for node, rows in zip(("a", "b"), found, strict=True):
        images = [image for row in rows for image in row.images]
        assert all(image.place.startswith(f"pack:{tmp_path / node}/") for image in images)
        assert {ImageReader().read(image) for image in images} == set(PICTURES)
    MemoryFileSystem.store.clear()
