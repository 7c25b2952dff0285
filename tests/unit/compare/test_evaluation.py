"""Evaluation of a finished student: its figures are those of `taid-ray eval`, and by document a plain computation's."""

import json
from pathlib import Path

import pytest
import torch

from taid_ray.compare.evaluation import Evaluation, Evaluator
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.student.evaluate import evaluate_model
from tests.support.paths import BUNDLE
from tests.support.students import noisy_teacher

STORIES, VALID = str(BUNDLE / "stories260k"), str(BUNDLE / "tinystories_valid.jsonl")
CPU = torch.device("cpu")


def config_for(path: str, **data: object) -> DistillConfig:
    return build_config(
        {
            "teacher": {"model": STORIES, "payload": "topk", "topk": 8},
            "student": {"init": "cut", "layers": [0]},
            "data": {"train": path, "valid": path, "valid_documents": 6, "sequence_length": 128} | data,
            "train": {"steps": 1},
        }
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noisy_teacher(tmp_path_factory.mktemp("other") / "model")


def test_figures_are_those_of_eval_and_documents_add_up(other: Path) -> None:
    found = Evaluator(config_for(VALID), CPU).evaluate(other)
    expected = evaluate_model(
        str(other), STORIES, VALID, ["data.valid_documents=6", "data.sequence_length=128"], rouge=False
    )
    assert sum(found.tokens) == expected.tokens and found.documents == ["1", "2", "3", "4", "5", "6"]
    assert found.mean["cross_entropy"] == pytest.approx(expected.cross_entropy, abs=1e-5)
    assert found.mean["forward_kl"] == pytest.approx(expected.kl, abs=1e-5)
    assert found.teacher["cross_entropy"] == pytest.approx(expected.teacher_cross_entropy, abs=1e-5)
    for name in ("cross_entropy", "forward_kl", "reverse_kl", "head_mass", "tail_mass"):
        total = sum(mean * tokens for mean, tokens in zip(found.by_document[name], found.tokens, strict=True))
        assert total / expected.tokens == pytest.approx(found.mean[name], rel=1e-9), name
    assert len({round(mean, 6) for mean in found.by_document["cross_entropy"]}) == 6
    assert "rouge_l" not in found.mean and found.rouge_l == []
    assert Evaluation(**json.loads(json.dumps(found.as_json()))) == found


def test_the_teacher_itself_has_its_own_figures_and_answers(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{name} went to", "response": "the park. It was a sunny day."} for name in ("Tom", "Lily")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Evaluator(config_for(str(pairs), format="prompt_response"), CPU).evaluate(Path(STORIES))
    assert found.mean["forward_kl"] == pytest.approx(0, abs=1e-7)
    assert found.mean["reverse_kl"] == pytest.approx(0, abs=1e-7)
    own = {name: found.mean[name] for name in found.teacher}
    assert own == pytest.approx(found.teacher, rel=1e-5)
    assert found.rouge_documents == ["1", "2"] and 0 < found.mean["rouge_l"] == sum(found.rouge_l) / 2


def test_documents_of_all_sources_of_a_mixture_are_evaluated(other: Path, tmp_path: Path) -> None:
    texts = [{"text": "Tom saw a big red ball."}, {"text": "Lily went to the park with her mom."}]
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, rows in zip(paths, (texts, texts[1:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(path), "valid": str(path), "weight": 1} for path in paths]
    config = config_for(VALID, train=sources, valid=None)
    found = Evaluator(config, CPU).evaluate(other)
    assert found.documents == ["one 1", "one 2", "two 1"]
    assert found.by_document["cross_entropy"][1] == pytest.approx(found.by_document["cross_entropy"][2], rel=1e-5)
