import torch

from taid_ray.data.batch import NO_LABEL, PAD_ID, Row, collate

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
