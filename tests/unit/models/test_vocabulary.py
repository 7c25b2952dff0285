"""Vocabulary alignment: what counts as shared, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data import dataset as data
from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.data.shared_ids import check_ids
from taid_ray.driver.preflight import prepare, with_data
from taid_ray.errors import ConfigError, DataError, ModelError
from taid_ray.models.vocabulary import align
from taid_ray.student.spec import DataCheck, RunSpec
from tests.support.paths import BUNDLE, SHARED
from tests.support.store import prepare_here

BASE = {token: index for index, token in enumerate("abcdef")}
TOKENIZERS = SHARED / "tokenizers"


def row(*ids: int) -> Row:
    return Row(list(ids), list(range(len(ids))), [NO_LABEL] * len(ids))


def test_without_a_teacher_all_rows_of_the_student_count(tmp_path: Path) -> None:
    """Also those that no token has, which it must learn to give nothing to."""
    from taid_ray.models.pair import shared_vocabulary, student_model_config

    tree = {
        "teacher": None,
        "student": {
            "init": "scratch",
            "model": str(BUNDLE / "stories260k"),
            "architecture": {"vocab_size": 520},
        },
        "data": {"train": str(BUNDLE / "tinystories_train.jsonl")},
        "loss": {"name": "sft"},
        "train": {"steps": 1},
    }
    config = build_config(tree)
    found = shared_vocabulary(config, None, student_model_config(config))
    assert (found.num_shared, found.student_rows, found.unshared_ids) == (520, 520, ())


def test_padded_embeddings_of_different_sizes_share_the_real_ids() -> None:
    tokens = {f"token {i}": i for i in range(151_665)}
    found = align(tokens, dict(tokens), 152_064, 151_936, resize_to_teacher=False)
    assert (found.num_shared, found.new_ids, found.unshared_ids) == (151_665, (), ())
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
    assert (plain.known_ids(), resized.known_ids()) == ([*range(6)], [*range(6)])
    assert (plain.unshared_ids, resized.unshared_ids) == ((), (6, 7, 8, 9))


def test_new_ids_may_lie_in_the_students_padding() -> None:
    found = align(BASE | {"<user>": 6, "<end>": 9}, BASE, 16, 12, resize_to_teacher=True)
    assert (found.new_ids, found.student_rows, found.known_ids()) == ((6, 9), 12, [*range(6)])


def test_ids_that_only_the_student_has() -> None:
    found = align(BASE, BASE | {"<pad>": 6}, 6, 8, resize_to_teacher=False)
    assert (found.num_shared, found.new_ids, found.unshared_ids) == (6, (), ())
    assert align(BASE, BASE | {"<pad>": 6}, 6, 8, resize_to_teacher=True).student_rows == 8


def test_a_gap_in_both_maps_stays_inside() -> None:
    gapped = {token: index for token, index in BASE.items() if index != 2}
    found = align(gapped, gapped, 6, 6, False)
    assert (found.num_shared, found.unshared_ids, found.known_ids()) == (6, (2,), [0, 1, 3, 4, 5])


def test_an_id_of_one_map_among_shared_ones_is_refused_unless_the_teachers_tokens_are_taken() -> None:
    gapped = {token: index for token, index in BASE.items() if index != 2}
    with pytest.raises(ModelError, match=r"1 ids below .*\(1 only in the teacher's\).*id 2: teacher 'c', student none"):
        align(BASE, gapped, 6, 6, False)
    with pytest.raises(ModelError, match=r"id 2: teacher none, student 'c'.*resize_to_teacher: true"):
        align(gapped, BASE, 6, 6, False)
    for found, new in ((align(BASE, gapped, 6, 6, True), (2,)), (align(gapped, BASE, 6, 6, True), ())):
        assert (found.num_shared, found.new_ids, found.unshared_ids) == (6, new, (2,))


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


RENAMED: Any = (BASE | {"<eos>": 6, "<User>": 7}, BASE | {"<end>": 6, "<user>": 7}, 8, 8)


def test_special_tokens_may_be_renamed_where_the_student_takes_the_teachers_tokenizer() -> None:
    """R1-Distill writes other special tokens on the ids that Qwen2.5 has."""
    found = align(*RENAMED, True, ({6, 7}, {6, 7}))
    assert found.renamed == ((6, "<end>", "<eos>"), (7, "<user>", "<User>"))
    assert (found.num_shared, found.new_ids, found.known_ids()) == (8, (), [*range(8)])  # they keep the student's rows
    assert align(BASE, BASE, 6, 6, True).renamed == ()
    with pytest.raises(ModelError, match=r"disagree on 2 of 8 .*Set student.resize_to_teacher: true"):
        align(*RENAMED, False, ({6, 7}, {6, 7}))


def test_special_tokens_may_be_moved_where_the_student_takes_the_teachers_tokenizer() -> None:
    swapped = BASE | {"<user>": 6, "<end>": 7}
    found = align(BASE | {"<end>": 6, "<user>": 9}, swapped, 10, 8, True, ({6, 9}, {6, 7}))
    assert (found.renamed, found.new_ids, found.num_shared) == (((6, "<user>", "<end>"),), (9,), 10)
    with pytest.raises(ModelError, match=r"id 6: teacher 'x', student '<user>'.*Choose a student"):
        align(BASE | {"x": 6}, swapped, 8, 8, True, ({6}, {7}))


def test_a_renamed_ordinary_token_is_a_disagreement() -> None:
    for added in (({6, 7}, {6}), ({6}, {6, 7})):
        with pytest.raises(ModelError, match=r"disagree on 1 of 8 ids, for example id 7: .*Choose a student"):
            align(*RENAMED, True, added)


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


# --- what `prepare` makes of it ------------------------------------------------------------------------------------


def prepared(tmp_path: Path, train: list[str], valid: list[str] | None, **changes: Any) -> RunSpec:
    """The plan for texts; arguments as for `configured`."""
    return prepare(configured(tmp_path, train, valid, **changes))


def configured(tmp_path: Path, train: list[str], valid: list[str] | None, **changes: Any) -> DistillConfig:
    """The configuration for texts, each the response to a short prompt; the student's ids end at `vocab_size`."""
    files = {}
    for name, texts in (("train", train), ("valid", valid)):
        if texts is not None:
            files[name] = str(tmp_path / f"{name}.jsonl")
            Path(files[name]).write_text("".join(json.dumps({"prompt": "Tom", "response": t}) + "\n" for t in texts))
    tree: dict[str, Any] = {
        "teacher": {"model": str(BUNDLE / "stories260k")},
        "student": {
            "init": "scratch",
            "dtype": "float32",
            "architecture": {"vocab_size": changes.pop("vocab_size", 512)},
        },
        "data": {
            "format": "prompt_response",
            "sequence_length": 16,
            "overlong": "drop",
            "pack": False,
            "valid_documents": 2,
        },
        "train": {"batch_size": 2} | (changes or {"steps": 1}),
    }
    return build_config(tree | {"data": tree["data"] | files, "out": str(tmp_path / "run")})


SHORT, LONG = "a", "Tom and his dog went home. " * 4
RARE, RARE_ID = "5", 480


def test_the_plan_says_what_became_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, plain = [], data.open_documents

    def open_documents(*arguments: Any) -> Any:
        opened.append(arguments[1])
        return plain(*arguments)

    monkeypatch.setattr(data, "open_documents", open_documents)
    found = prepared(tmp_path, [SHORT, LONG, SHORT, SHORT], [SHORT, LONG]).data
    assert replace(found, description=[], rows_digest="") == DataCheck(3, 1, 0, 1, [])
    assert "1 file of the kind json (train.jsonl)" in found.description[0]  # counted when they are prepared
    assert opened == ["train", "valid"]


def test_validation_rows_hold_shared_ids_only(tmp_path: Path) -> None:
    assert prepared(tmp_path, [SHORT], [SHORT], vocab_size=RARE_ID).vocabulary.num_shared == RARE_ID
    with pytest.raises(DataError, match=rf"in row 2 is not known to both models: they share the ids below {RARE_ID}"):
        prepared(tmp_path, [SHORT], [SHORT, RARE], vocab_size=RARE_ID)
    with pytest.raises(DataError, match="in row 1 is not known"):
        prepared(tmp_path, [RARE], [SHORT], vocab_size=RARE_ID)


def test_a_warm_up_longer_than_the_epochs_is_refused(tmp_path: Path) -> None:
    texts = [SHORT] * 7  # 3 whole batches of 2 rows
    for warmup_steps in (3, 4):
        config = configured(tmp_path, texts, [SHORT], epochs=1.0, warmup_steps=warmup_steps)
        spec = prepare(config)
        assert spec.total_steps == 0  # not known before the data are prepared
        data = prepare_here(config)
        if warmup_steps == 3:
            assert with_data(config, spec, data).total_steps == 3
        else:
            with pytest.raises(ConfigError, match=r"train\.warmup_steps = 4 exceeds the 3 steps of train\.epochs = 1;"):
                with_data(config, spec, data)
