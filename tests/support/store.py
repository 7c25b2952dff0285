"""Data files for tests of the store of encoded data, and their preparation without Ray."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from taid_ray.config.schema import DistillConfig
from taid_ray.data.reading.kinds import DataFile, kind_of
from taid_ray.data.store.assemble import assemble
from taid_ray.data.store.prepare import Encoding, prepare_span
from taid_ray.data.store.prepared import PreparedData, mixed
from taid_ray.data.store.spans import spans_of
from taid_ray.driver import asked_rows, cache_fill
from taid_ray.models.pair import run_media, run_tokenizer

STORE = tempfile.TemporaryDirectory(prefix="taid-store-")
"""Shared by the tests of a process, since what is in it never changes."""


def data_file(path: Path) -> DataFile:
    """The file as the reading of data knows it."""
    kind = kind_of(path)
    assert kind is not None
    return DataFile(path, path.name, kind)


def prepare_here(config: DistillConfig, num_shared: int = 1 << 32) -> PreparedData:
    """Prepares the training data of `config` in this process, one span after another."""
    sources = []
    for source in config.data.sources:
        encoding, spans = Encoding(source, run_tokenizer(config), run_media(config)), spans_of(source)
        directory = Path(STORE.name) / encoding.key
        directory.mkdir(exist_ok=True)
        shards = [shard for span in spans if (shard := prepare_span(span, encoding, directory, print))]
        sources.append(assemble(encoding, spans, shards, directory, num_shared, print))
    return mixed(config.data, sources)


@contextmanager
def preparing_here() -> Iterator[None]:
    """Has the rows for which a teacher is asked prepared by `prepare_here`, so that nothing needs Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asked_rows, "prepare_data", lambda config, num_shared, _: prepare_here(config, num_shared))
        patch.setattr(cache_fill, "ray_cluster", nullcontext)
        yield


def story(number: int) -> str:
    """A text of its own for every number, of 10 to 90 tokens."""
    return f"Once upon a time, story {number} began." + " The dog ran to the cat." * (number % 11)
