"""`taid-ray eval`: its figures are those of a plain computation, and its table shows them."""

import json
import math
import sys
from typing import Any

import pytest
import torch

from taid_ray.cli import app as cli
from taid_ray.config.models import StudentConfig, TeacherConfig
from taid_ray.errors import ConfigError, ModelError
from taid_ray.models.loading import load_causal_lm, load_tokenizer
from taid_ray.student import evaluate as measure
from taid_ray.student.evaluate import evaluate_model
from taid_ray.teacher import model as teacher_model
from tests.support.paths import BUNDLE
from tests.support.students import noisy_teacher

STORIES, VALID = str(BUNDLE / "stories260k"), str(BUNDLE / "tinystories_valid.jsonl")
DOCUMENTS = 6


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(noisy_teacher(tmp_path_factory.mktemp("other") / "model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{name} went to the park.", "response": "It was a sunny day."} for name in ("Tom", "Lily", "Tim")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_model_measured_against_itself() -> None:
    found = evaluate_model(STORIES, STORIES, VALID, [f"data.valid_documents={DOCUMENTS}"], rouge=False)
    assert found.kl == pytest.approx(0, abs=1e-7)
    # The teacher groups the rows in its own way, so the last bits differ.
    assert found.cross_entropy == pytest.approx(found.teacher_cross_entropy, rel=1e-7)
    assert 1 < found.cross_entropy < 2
    assert found.answers == {} and found.notes == ()


@pytest.mark.parametrize("overrides", [[], ["data.pack=false"], ["data.sequence_length=512"]])
@torch.no_grad()
def test_figures_equal_a_plain_computation_from_logits(other: str, overrides: list[str]) -> None:
    tokenizer, model, teacher = (
        load_tokenizer(TeacherConfig(model=STORIES)),
        load_causal_lm(TeacherConfig(model=other)),
        load_causal_lm(TeacherConfig(model=STORIES)),
    )
    cross_entropy = teacher_cross_entropy = kl = tokens = 0.0
    with open(VALID, encoding="utf-8") as lines:
        for line, _ in zip(lines, range(DOCUMENTS), strict=False):
            ids = torch.tensor([[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]])
            assert ids.shape[1] <= 512
            q, p = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (model, teacher))
            labels = ids[0, 1:, None]
            cross_entropy -= float(q.gather(1, labels).sum())
            teacher_cross_entropy -= float(p.gather(1, labels).sum())
            kl += float((p.exp() * (p - q)).sum())
            tokens += len(labels)
    found = evaluate_model(other, STORIES, VALID, [f"data.valid_documents={DOCUMENTS}", *overrides], rouge=False)
    assert found.tokens == tokens
    assert found.cross_entropy == pytest.approx(cross_entropy / tokens, abs=1e-5)
    assert found.teacher_cross_entropy == pytest.approx(teacher_cross_entropy / tokens, abs=1e-5)
    assert found.kl == pytest.approx(kl / tokens, abs=1e-5)
    assert found.kl > 0.01


def test_keys_of_the_model_have_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model is loaded once, as its section says."""
    loaded: dict[type, TeacherConfig | StudentConfig] = {}

    def load(source: TeacherConfig | StudentConfig, **options: Any) -> Any:
        assert type(source) not in loaded
        loaded[type(source)] = source
        return load_causal_lm(source.model_copy(update={"trust_remote_code": False}), **options)

    monkeypatch.setattr(measure, "load_causal_lm", load)
    monkeypatch.setattr(teacher_model, "load_causal_lm", load)
    keys = ["student.dtype=bfloat16", "student.attention=eager", "student.trust_remote_code=true", "device=cpu"]
    documents = f"data.valid_documents={DOCUMENTS}"
    found = evaluate_model(STORIES, STORIES, VALID, [*keys, "teacher.attention=eager", documents], rouge=False)
    student, teacher = loaded[StudentConfig], loaded[TeacherConfig]
    assert [(each.dtype, each.attention) for each in (student, teacher)] == [("bfloat16", "eager"), ("auto", "eager")]
    assert (student.trust_remote_code, teacher.trust_remote_code) == (True, False)
    assert 1e-6 < found.kl < 1e-2  # what bfloat16 costs


def test_rouge_loads_no_model_again(pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = []

    def load(source: TeacherConfig, **options: Any) -> Any:
        teachers.append(source.dtype)
        return load_causal_lm(source, **options)

    monkeypatch.setattr(teacher_model, "load_causal_lm", load)
    generating = []
    monkeypatch.setattr(
        measure, "answers", lambda model, *_: generating.append(model.dtype) or [("a", "A "), ("b", "c")]
    )
    keys = ["teacher.dtype=bfloat16", "data.format=prompt_response", "data.valid_documents=2"]
    assert evaluate_model(STORIES, STORIES, pairs, keys, rouge=True).answers["exact match"] == (0.5, 0.5)
    assert (teachers, generating) == (["bfloat16"], [torch.float32, torch.bfloat16])


def test_a_teacher_that_cannot_pack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_model, "_packing_error", lambda *_: "documents see each other")
    documents = f"data.valid_documents={DOCUMENTS}"
    with pytest.raises(ModelError, match=r"teacher\.model: documents see each other"):
        evaluate_model(STORIES, STORIES, VALID, [documents], rouge=False)
    assert evaluate_model(STORIES, STORIES, VALID, [documents, "data.pack=false"], rouge=False).tokens


def test_a_model_whose_hidden_states_are_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With figures that are not finite a table would say nothing."""
    monkeypatch.setattr(measure, "hidden_states", lambda model, inputs: inputs["input_ids"][..., None].half() * 1e6)
    with pytest.raises(ModelError, match=r"^student\.model: .* not finite in float16; set student\.dtype: bfloat16$"):
        evaluate_model(STORIES, STORIES, VALID, [f"data.valid_documents={DOCUMENTS}"], rouge=False)


@pytest.mark.parametrize(
    "key", ["teacher.payload=logits", "student.lora={}", "data.split=test", "loss.name=js", "out=a", "data={train: a}"]
)
def test_keys_without_a_use_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="makes no use"):
        evaluate_model(STORIES, STORIES, VALID, [key], rouge=False)


def test_the_table_of_prompts_and_responses(
    pairs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        STORIES,
        "--teacher",
        STORIES,
        "--data",
        pairs,
        "format=prompt_response",
        "valid_documents=2",
        "--rouge",
    ]
    monkeypatch.setattr(sys, "argv", ["taid-ray", "eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    shown = capsys.readouterr()
    assert shown.err == ""
    model, teacher = (
        [cell.strip() for cell in line.split("│")[1:-1]] for line in shown.out.splitlines() if "│" in line
    )
    assert (model[0], teacher[0]) == ("model", "teacher")
    assert model[1] == teacher[1] and model[4:] == teacher[4:]
    assert float(model[2]) == pytest.approx(math.exp(float(model[1])), rel=1e-3)
    assert (model[3], teacher[3]) == ("0.0000", "-")
    assert 0 < float(model[4]) < 1 and model[5] == "0.0000"
