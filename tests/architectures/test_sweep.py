"""Every causal language model of transformers, built tiny, is refused or exact, as docs/architectures.md says."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from tests.support.architectures.fields import NOT_BUILT
from tests.support.architectures.split import SplitTeacher
from tests.support.architectures.table import PAGE, page_rows, table, tried, versions
from tests.support.architectures.tiny import build, names, tiny_config

pytestmark = [pytest.mark.architectures, pytest.mark.usefixtures("one_process_group")]


@pytest.fixture(scope="module")
def split() -> Iterator[SplitTeacher]:
    gc.freeze()  # DeepSpeed collects often
    shards = SplitTeacher()
    yield shards
    shards.close()


@pytest.mark.parametrize("name", names())
def test_it_is_refused_or_exact(name: str, tmp_path: Path, split: SplitTeacher) -> None:
    row, wrong = tried(name, tmp_path, split)
    assert not wrong
    assert row == page_rows()[name]


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_not_tried_cannot_be_built(name: str) -> None:
    with pytest.raises((ImportError, AttributeError, ValueError, StrictDataclassError)):
        build(tiny_config(name), seed=0)


def test_the_page_is_as_the_sweep_writes_it() -> None:
    rows = page_rows()
    assert list(rows) == names() and versions() in PAGE.read_text(encoding="utf-8")
    assert table(list(rows.values())) in PAGE.read_text(encoding="utf-8")
