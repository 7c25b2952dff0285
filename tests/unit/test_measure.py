"""`taid-ray eval`: its figures are those of a plain computation, and its table shows them."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from taid_ray import cli
from taid_ray.measure import evaluate_model, rouge_l
from taid_ray.models import load_causal_lm, load_tokenizer
from taid_ray.packing import Sample

BUNDLE = Path(__file__).parents[2] / "taid_ray" / "quickstart"
STORIES, VALID = str(BUNDLE / "stories260k"), str(BUNDLE / "tinystories_valid.jsonl")
DOCUMENTS = 6


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model with noise on its weights."""
    path = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(STORIES, path)
    model = load_causal_lm(STORIES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(path)
    return str(path)


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
    assert found.cross_entropy == found.teacher_cross_entropy
    assert 1 < found.cross_entropy < 2
    assert found.rouge_l is None


@pytest.mark.parametrize("overrides", [[], ["data.pack=false"], ["data.sequence_length=512"]])
@torch.no_grad()
def test_figures_equal_a_plain_computation_from_logits(other: str, overrides: list[str]) -> None:
    tokenizer, model, teacher = load_tokenizer(STORIES), load_causal_lm(other), load_causal_lm(STORIES)
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


class Parrot:
    """Answers every prompt with fixed tokens."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def generate(self, input_ids: Any, **options: Any) -> Any:
        return torch.cat([input_ids, torch.tensor([self.answer])], 1)


def test_rouge_compares_with_the_response() -> None:
    tokenizer = load_tokenizer(STORIES)
    prompt, response, other = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("Tom went to the park.", "It was a sunny day.", "It was a day.")
    )
    sample = Sample([*prompt, *response], [False] * len(prompt) + [True] * len(response))

    def score(answer: list[int]) -> float:
        return rouge_l(Parrot(answer), tokenizer, [sample], torch.device("cpu"))

    assert score(response) == 1
    assert score(prompt) == 0
    assert score(other) == pytest.approx(2 * 4 / (4 + 5))  # four words in common, of four and of five


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
    assert model[1] == teacher[1] and model[4] == teacher[4]
    assert float(model[2]) == pytest.approx(math.exp(float(model[1])), rel=1e-3)
    assert (model[3], teacher[3]) == ("0.0000", "-")
    assert 0 <= float(model[4]) <= 1
