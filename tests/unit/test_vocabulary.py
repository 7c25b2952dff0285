"""Vocabulary alignment: what counts as shared, and what is refused."""

from pathlib import Path

import pytest

from taid_ray.batch import NO_LABEL, Row
from taid_ray.errors import DataError, ModelError
from taid_ray.vocabulary import align, check_ids

BASE = {token: index for index, token in enumerate("abcdef")}
TOKENIZERS = Path(__file__).parents[3] / "shared/data/tokenizers"


def row(*ids: int) -> Row:
    return Row(list(ids), list(range(len(ids))), [NO_LABEL] * len(ids))


def test_padded_embeddings_of_different_sizes_share_the_real_ids() -> None:
    tokens = {f"token {i}": i for i in range(151_665)}
    found = align(tokens, dict(tokens), 152_064, 151_936, resize_to_teacher=False)
    assert (found.num_shared, found.new_ids, found.student_only_ids) == (151_665, (), ())
    assert found.student_rows == 151_936


def test_ids_without_a_row_in_their_model_are_not_real() -> None:
    assert align(BASE, BASE, 6, 4, False).num_shared == 4
    assert align(BASE, BASE, 3, 6, False).num_shared == 3
    assert align(BASE, BASE, 6, 4, True).new_ids == (4, 5)


def test_ids_that_only_the_teacher_has() -> None:
    teacher = BASE | {"<user>": 6, "<end>": 9}
    plain = align(teacher, BASE, 16, 8, resize_to_teacher=False)
    assert (plain.num_shared, plain.new_ids, plain.student_rows) == (6, (6, 9), 8)
    resized = align(teacher, BASE, 16, 8, resize_to_teacher=True)
    assert (resized.num_shared, resized.new_ids, resized.student_rows) == (10, (6, 9), 10)


def test_ids_that_only_the_student_has() -> None:
    found = align(BASE, BASE | {"<pad>": 6}, 6, 8, resize_to_teacher=False)
    assert (found.num_shared, found.student_only_ids) == (6, (6,))
    assert align(BASE, BASE | {"<pad>": 6}, 6, 8, resize_to_teacher=True).student_rows == 8


def test_a_gap_in_both_maps_stays_inside() -> None:
    gapped = {token: index for token, index in BASE.items() if index != 2}
    assert align(gapped, gapped, 6, 6, False).num_shared == 6


def test_an_id_of_one_map_among_shared_ones_is_refused_unless_the_teachers_tokens_are_taken() -> None:
    gapped = {token: index for token, index in BASE.items() if index != 2}
    with pytest.raises(ModelError, match=r"1 ids below .*\(1 only in the teacher's\).*id 2: teacher 'c', student none"):
        align(BASE, gapped, 6, 6, False)
    with pytest.raises(ModelError, match=r"id 2: teacher none, student 'c'.*resize_to_teacher: true"):
        align(gapped, BASE, 6, 6, False)
    assert align(BASE, gapped, 6, 6, True).num_shared == 6
    assert align(gapped, BASE, 6, 6, True).num_shared == 6


def test_disagreement_says_how_many_and_shows_three() -> None:
    shifted = {token: (index + 1) % 6 for token, index in BASE.items()}
    with pytest.raises(ModelError) as caught:
        align(BASE, shifted, 6, 6, True)
    text = str(caught.value)
    assert "disagree on 6 of 6 ids" in text
    assert "id 0: teacher 'a', student 'f'; id 1: teacher 'b', student 'a'; id 2: teacher 'c', student 'b'." in text


def test_the_same_token_under_two_ids_is_a_disagreement() -> None:
    with pytest.raises(ModelError, match="id 6: teacher '<end>', student none"):
        align(BASE | {"<end>": 6}, BASE | {"<end>": 7}, 8, 8, False)


def test_nothing_in_common() -> None:
    with pytest.raises(ModelError, match="share no token ids"):
        align({"a": 0}, {"b": 1}, 2, 2, False)


def test_check_ids_names_the_id_and_its_token() -> None:
    check_ids([row(1, 5), row(0)], 6)
    with pytest.raises(DataError, match=r"'<user>' with id 6 in row 2 .*below 6.*resize_to_teacher: true"):
        check_ids([row(1, 5), row(6, 1)], 6, BASE | {"<user>": 6})
    with pytest.raises(DataError, match="token with id 6"):
        check_ids([row(6)], 6)


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="needs ../shared")
def test_real_tokenizers() -> None:
    from transformers import AutoTokenizer

    qwen, gpt2, llama = (
        AutoTokenizer.from_pretrained(TOKENIZERS / n).get_vocab() for n in ("qwen1.5", "gpt2", "tinyllama")
    )
    assert align(qwen, qwen, 152_064, 151_936, False).num_shared == 151_646
    with pytest.raises(ModelError, match=r"disagree on [0-9]{5} of 50257 ids.*id "):
        align(gpt2, llama, 50_257, 32_000, False)
    phi3 = llama | {f"<|added {i}|>": 32_000 + i for i in range(11)}
    assert align(phi3, llama, 32_064, 32_000, False).num_shared == 32_000
    assert align(phi3, llama, 32_064, 32_000, True).student_rows == 32_011
