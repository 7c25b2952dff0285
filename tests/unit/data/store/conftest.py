"""What the tests of the store share: a small tokenizer, files of stories, and a store of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from taid_ray.config.data import DataSource
from taid_ray.data.store import prepare, spans
from taid_ray.data.store.prepare import Encoding, prepare_span
from taid_ray.data.store.shard import ShardFacts
from taid_ray.data.store.spans import Span, cut
from tests.support.paths import BUNDLE
from tests.support.store import data_file, story


@pytest.fixture(scope="session")
def stories_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLE / "stories260k")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans, blocks and windows of which a few kilobytes of text make several."""
    monkeypatch.setattr(spans, "SPAN_BYTES", 3000)
    monkeypatch.setattr(prepare, "BLOCK_DOCUMENTS", 8)
    monkeypatch.setattr(prepare, "WINDOW_TOKENS", 500)


@pytest.fixture
def stories(tmp_path: Path) -> list[Span]:
    """Spans of a file of 97 documents."""
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story(n)}) + "\n" for n in range(97)))
    return cut(data_file(path))


@pytest.fixture
def encoding(stories_tokenizer: Any) -> Encoding:
    return Encoding(DataSource(train="stories.jsonl", sequence_length=64), stories_tokenizer)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    directory = tmp_path / "store"
    directory.mkdir()
    return directory


@pytest.fixture
def prepared(stories: list[Span], encoding: Encoding, store: Path) -> Callable[[], list[ShardFacts]]:
    """Prepares all spans of the stories, in order."""

    def run() -> list[ShardFacts]:
        found = [prepare_span(span, encoding, store, print) for span in stories]
        return [facts for facts in found if facts is not None]

    return run
