from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taid_ray.data.batch import NO_LABEL, PAD_ID, Row, collate
from taid_ray.media.refs import ImageRef

PACKED = Row([5, 6, 7, 8, 9], [0, 1, 0, 1, 2], [6, NO_LABEL, NO_LABEL, 9, 4])
SHORT = Row([3, 2], [0, 1], [2, NO_LABEL])


def test_collate_by_hand() -> None:
    batch = collate([SHORT, PACKED])
    assert batch.inputs["input_ids"].tolist() == [[3, 2, PAD_ID, PAD_ID, PAD_ID], [5, 6, 7, 8, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]
    assert batch.loss_positions.tolist() == [0, 5, 8, 9]
    assert batch.labels.tolist() == [2, 6, 9, 4]
    assert batch.num_loss_tokens == 4 == SHORT.num_loss_tokens + PACKED.num_loss_tokens
    assert set(batch.inputs) == {"input_ids", "position_ids"}


def test_everything_is_int64() -> None:
    for batch in (collate([SHORT]), collate([])):
        assert {t.dtype for t in (*batch.inputs.values(), batch.loss_positions, batch.labels)} == {torch.int64}


def test_padding_starts_no_new_document() -> None:
    """A restart of the positions would be taken for another packed document."""
    positions = collate([Row([1, 2, 3], [0, 0, 1], [NO_LABEL] * 3), PACKED]).inputs["position_ids"]
    assert positions[0].tolist() == [0, 0, 1, 2, 3]


def test_a_label_equal_to_the_padding_id_counts() -> None:
    batch = collate([Row([1, PAD_ID, PAD_ID], [0, 1, 2], [PAD_ID, PAD_ID, NO_LABEL]), PACKED])
    assert batch.loss_positions.tolist()[:2] == [0, 1] and batch.labels.tolist()[:2] == [PAD_ID, PAD_ID]


def test_no_rows_give_one_token_and_no_loss_position() -> None:
    batch = collate([])
    assert batch.inputs["input_ids"].tolist() == [[PAD_ID]] and batch.inputs["position_ids"].tolist() == [[0]]
    assert batch.num_loss_tokens == 0 and batch.labels.shape == batch.loss_positions.shape == (0,)


def test_rows_are_left_as_they_were() -> None:
    row = Row([3, 2], [0, 1], [2, NO_LABEL])
    collate([row, PACKED])
    assert row == Row([3, 2], [0, 1], [2, NO_LABEL])


def test_rows_without_loss_positions() -> None:
    batch = collate([Row([1, 2], [0, 1], [NO_LABEL] * 2)])
    assert batch.num_loss_tokens == 0 and batch.inputs["input_ids"].shape == (1, 2)


def test_rows_are_arrays_and_compare_by_what_they_hold() -> None:
    row = Row([3, 2], [0, 1], [2, NO_LABEL], (7,))
    assert {array.dtype for array in (row.input_ids, row.position_ids, row.targets)} == {np.dtype(np.int64)}
    assert row == Row(np.array([3, 2], dtype=np.uint32), np.arange(2), np.array([2, NO_LABEL]), (7,))
    others = [SHORT, Row([3, 1], [0, 1], [2, NO_LABEL], (7,)), Row([3, 2], [0, 0], [2, NO_LABEL], (7,))]
    assert all(row != other for other in (*others, Row([3, 2], [0, 1], [1, NO_LABEL], (7,)), "row"))


@st.composite
def any_row(draw: st.DrawFn) -> Row:
    length = draw(st.integers(1, 9))
    ids, targets = (draw(st.lists(st.integers(0, 5), min_size=length, max_size=length)) for _ in range(2))
    begins = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    positions, targets = [0], [draw(st.sampled_from([target, NO_LABEL])) for target in targets]
    for begin in begins[1:]:
        positions.append(0 if begin else positions[-1] + 1)
    return Row(ids, positions, targets)


def plainly(rows: Sequence[Row]) -> list[Tensor]:
    """The batch token by token: input_ids, position_ids, loss_positions, labels."""
    length = max((len(row.input_ids) for row in rows), default=1)
    ids, positions, targets = [], [], []
    for row in rows or [Row([PAD_ID], [0], [NO_LABEL])]:
        missing = length - len(row.input_ids)
        following = int(row.position_ids[-1]) + 1
        ids.append([*row.input_ids.tolist(), *[PAD_ID] * missing])
        positions.append([*row.position_ids.tolist(), *range(following, following + missing)])
        targets.extend([*row.targets.tolist(), *[NO_LABEL] * missing])
    where = [place for place, target in enumerate(targets) if target != NO_LABEL]
    labels = [targets[place] for place in where]
    return [torch.tensor(values, dtype=torch.int64) for values in (ids, positions, where, labels)]


@settings(deadline=None, max_examples=200)
@given(st.lists(any_row(), max_size=5))
def test_collate_is_what_one_would_write_plainly(rows: list[Row]) -> None:
    batch = collate(rows)
    found = [batch.inputs["input_ids"], batch.inputs["position_ids"], batch.loss_positions, batch.labels]
    for one, other in zip(found, plainly(rows), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_images_of_each_row() -> None:
    """A batch of text alone has no images at all; else every row has its own, also where that is none."""
    image = ImageRef("0" * 32, start=0, tokens=2, width=4, height=4, place="memory:")
    seen = replace(SHORT, images=(image,))
    assert seen != SHORT
    assert collate([SHORT, PACKED]).images == () == collate([]).images
    assert collate([PACKED, seen]).images == ((), (image,))
