"""Mixtures: several prepared sources in given proportions."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.store.prepared import PreparedData
from taid_ray.errors import DataError
from tests.support.paths import BUNDLE
from tests.support.store import prepare_here, story

SIZES = {"short": 40, "long": 25, "few": 9}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of some stories each. Without packing each of them is a row."""
    root, found, first = tmp_path_factory.mktemp("mixture"), {}, 0
    for name, size in SIZES.items():
        found[name] = root / f"{name}.jsonl"
        texts = (story(number) for number in range(first, first + size))
        found[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        first += size
    return found


def config_of(train: Any, **data: Any) -> DistillConfig:
    return build_config(
        {
            "teacher": {"model": str(BUNDLE / "stories260k")},
            "student": {"init": "cut", "layers": [0]},
            "data": {"train": train, "valid_documents": 2, "sequence_length": 128, "pack": False} | data,
            "train": {"steps": 4, "batch_size": 6},
        }
    )


def counted(data: PreparedData, epoch: int, seed: int = 3) -> tuple[Counter[int], Counter[tuple[int, ...]]]:
    """How often the rows of each source, and each row, come in an epoch."""
    reader = data.reader(seed, data.rows)
    rows = reader.read(epoch, 0, 1).rows
    return Counter(row.source for row in rows), Counter(row.documents for row in rows)


def test_without_proportions_every_row_comes_once(files: dict[str, Path]) -> None:
    data = prepare_here(config_of([str(files["short"]), str(files["long"])]))
    assert data.uses == (38, 23) and data.rows == 61  # two documents of each are kept for validation
    for epoch in range(2):
        sources, rows = counted(data, epoch)
        assert sources == {0: 38, 1: 23} and set(rows.values()) == {1}


def test_weights_are_exact_in_every_epoch(files: dict[str, Path]) -> None:
    train = [{"path": str(files["short"]), "weight": 1}, {"path": str(files["few"]), "weight": 3}]
    data = prepare_here(config_of(train))
    assert data.uses == (11, 34)  # of 38 + 7 rows: 11.25 and 33.75
    used: Counter[tuple[int, ...]] = Counter()
    for epoch in range(3):
        sources, rows = counted(data, epoch)
        assert sources == {0: 11, 1: 34}
        used += rows
        few = [count for (document,), count in used.items() if document > 40]
        assert len(few) == 7 and max(few) - min(few) <= 1  # all are used before one is used again


def test_numbers_of_rows_stand_beside_weights(files: dict[str, Path]) -> None:
    train = [
        {"path": str(files["short"]), "weight": 1},
        {"path": str(files["few"]), "rows": 5},
        {"path": str(files["long"]), "weight": 1},
    ]
    data = prepare_here(config_of(train))
    assert data.uses == (31, 5, 30) and data.totals.rows == 38 + 7 + 23
    assert counted(data, 0)[0] == {0: 31, 1: 5, 2: 30}


def test_a_source_that_would_never_come_is_refused(files: dict[str, Path]) -> None:
    train = [{"path": str(files["short"]), "weight": 1000}, {"path": str(files["few"]), "weight": 1}]
    with pytest.raises(DataError, match=r"data\.train\[1\]\.weight = 1 gives .*few\.jsonl none of the 45 rows"):
        prepare_here(config_of(train))


def test_a_list_of_one_source_is_that_source(files: dict[str, Path]) -> None:
    alone, listed = (prepare_here(config_of(train)) for train in (str(files["long"]), [str(files["long"])]))
    assert listed.digest == alone.digest == alone.totals.digest
    assert listed.reader(1, 6).read(2, 0, 1) == alone.reader(1, 6).read(2, 0, 1)


def test_the_digest_tells_mixtures_apart(files: dict[str, Path]) -> None:
    short, few = str(files["short"]), str(files["few"])
    mixtures = [[short, few], [few, short], [{"path": short, "rows": 9}, few], [short, {"path": few, "rows": 9}]]
    assert len({prepare_here(config_of(train)).digest for train in mixtures}) == len(mixtures)


def test_sources_have_encodings_of_their_own(files: dict[str, Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": "Tell!", "response": story(n)}) + "\n" for n in range(12)))
    train = [str(files["few"]), {"path": str(pairs), "format": "prompt_response"}]
    data = pickle.loads(pickle.dumps(prepare_here(config_of(train))))  # as workers get it
    places = [Path(str(source.index)).parent for source in data.sources]
    assert places[0] != places[1]
    learnt: dict[int, set[bool]] = {0: set(), 1: set()}
    for row in data.reader(0, data.rows).read(0, 0, 1).rows:
        learnt[row.source].add(row.num_loss_tokens == len(row.input_ids) - 1)
    assert learnt == {0: {True}, 1: {False}}  # a prompt carries no loss


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_batches_of_a_mixture_do_not_depend_on_the_ranks(files: dict[str, Path], ranks: int) -> None:
    train = [{"path": str(files["short"]), "weight": 1}, {"path": str(files["few"]), "weight": 1}]
    data = prepare_here(config_of(train))
    whole = data.reader(5, 6).read(9, 0, 1)
    parts = [data.reader(5, 6).read(9, rank, ranks) for rank in range(ranks)]
    assert [row for part in parts for row in part.rows] == whole.rows
    assert {part.num_loss_tokens for part in parts} == {whole.num_loss_tokens}
