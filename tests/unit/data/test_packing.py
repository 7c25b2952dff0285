"""Packing: nothing lost, nothing doubled, nothing predicted across documents."""

import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.data.packing import Sample, cut, to_rows
from taid_ray.media.refs import ImageRef

LENGTH = 12


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    """Samples whose tokens are all different, so that every token can be followed, each with its first as document."""
    token, samples = 0, []
    for length in draw(st.lists(st.integers(1, LENGTH), max_size=30)):
        mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        samples.append(Sample(list(range(token, token + length)), mask, token))
        token += length
    return samples


def documents(row: Row) -> list[tuple[int, ...]]:
    """The samples of a row, told apart by their position ids alone."""
    starts = [i for i, position in enumerate(row.position_ids) if position == 0] + [len(row.input_ids)]
    return [tuple(row.input_ids[a:b].tolist()) for a, b in pairwise(starts)]


@settings(deadline=None, max_examples=150)
@given(samples=sample_lists(), pack=st.booleans())
def test_every_sample_is_in_exactly_one_row(samples: list[Sample], pack: bool) -> None:
    rows = to_rows(samples, LENGTH, pack)
    assert Counter(d for row in rows for d in documents(row)) == Counter(tuple(s.input_ids) for s in samples)
    for row in rows:
        assert 1 <= len(row.input_ids) <= LENGTH
        assert len(row.position_ids) == len(row.targets) == len(row.input_ids)
        assert row.position_ids.tolist() == [i for d in documents(row) for i in range(len(d))]
        assert row.documents == tuple(d[0] for d in documents(row))
    if not pack:
        assert [row.input_ids.tolist() for row in rows] == [s.input_ids for s in samples]


@settings(deadline=None, max_examples=150)
@given(samples=sample_lists(), pack=st.booleans())
def test_targets_are_the_next_token_of_the_same_sample_where_the_mask_says_so(
    samples: list[Sample], pack: bool
) -> None:
    expected = {}
    for sample in samples:
        for i, token in enumerate(sample.input_ids):
            inside = i + 1 < len(sample.input_ids) and sample.loss_mask[i + 1]
            expected[token] = sample.input_ids[i + 1] if inside else NO_LABEL
    rows = to_rows(samples, LENGTH, pack)
    found = {
        token: target
        for row in rows
        for token, target in zip(row.input_ids.tolist(), row.targets.tolist(), strict=True)
    }
    assert found == expected
    assert sum(row.num_loss_tokens for row in rows) == sum(s.num_loss_tokens for s in samples)


@settings(deadline=None, max_examples=60)
@given(samples=sample_lists(), shuffled=st.randoms())
def test_packing_is_deterministic_and_row_count_does_not_depend_on_order(samples: list[Sample], shuffled) -> None:
    rows = to_rows(samples, LENGTH, True)
    assert rows == to_rows(list(samples), LENGTH, True)
    other = samples.copy()
    shuffled.shuffle(other)
    assert len(to_rows(other, LENGTH, True)) == len(rows)


def test_best_fit_fills_rows() -> None:
    samples = [Sample([n] * n, [True] * n) for n in (3, 5, 7, 9, 1, 11)]
    assert sorted(len(row.input_ids) for row in to_rows(samples, LENGTH, True)) == [12, 12, 12]


@settings(deadline=None)
@given(count=st.integers(0, 50), length=st.integers(2, 10))
def test_cut_keeps_all_tokens_but_a_lone_last_one(count: int, length: int) -> None:
    pieces = cut(range(count), length, 7)
    kept = [token for piece in pieces for token in piece.input_ids]
    assert kept == list(range(count - (count % length == 1)))
    assert all(2 <= len(p.input_ids) <= length for p in pieces)
    assert all(p.loss_mask == [False] + [True] * (len(p.input_ids) - 1) and p.document == 7 for p in pieces)


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="13 tokens, rows hold 12"):
        to_rows([Sample([1] * 13, [True] * 13)], LENGTH, True)


def test_a_large_block_packs_quickly() -> None:
    samples = [s for n in range(1024) for s in cut([7] * (1500 + n), 2048)]
    start = time.process_time()
    rows = to_rows(samples, 2048, True)
    assert time.process_time() - start < 3  # 0.3 s on an idle core
    assert sum(len(row.input_ids) for row in rows) / (2048 * len(rows)) > 0.95


def test_images_go_with_their_samples() -> None:
    """In a packed row every image's tokens stand where its sample has put them."""
    samples = []
    for number, length in enumerate([5, 3, 4]):
        ids = list(range(100 * number, 100 * number + length))
        image = ImageRef(f"{number:032x}", start=1, tokens=2, width=9, height=8, place="memory:")
        samples.append(Sample(ids, [False] * length, number + 1, (image,) if number != 1 else ()))
    rows = to_rows(samples, LENGTH, pack=True)
    found = {
        image.digest: row.input_ids[image.start : image.start + image.tokens] for row in rows for image in row.images
    }
    assert {int(digest, 16): ids.tolist() for digest, ids in found.items()} == {0: [1, 2], 2: [201, 202]}
    assert [image.start for row in rows for image in row.images] == sorted(i.start for row in rows for i in row.images)
