"""ROUGE-L of generated answers, and answers that are the same in batches and alone."""

from typing import Any

import pytest
import torch

from taid_ray.config.schema import TeacherConfig
from taid_ray.data.packing import Sample
from taid_ray.models.loading import load_causal_lm, load_tokenizer
from taid_ray.student import rouge
from taid_ray.student.rouge import greedy_answers, ignores_padding, rouge_scores
from tests.support.paths import BUNDLE

STORIES = TeacherConfig(model=str(BUNDLE / "stories260k"))
CPU = torch.device("cpu")


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
        (score,) = rouge_scores(Parrot(answer), tokenizer, [sample], CPU)
        return score

    assert score(response) == 1
    assert score(prompt) == 0
    assert score(other) == pytest.approx(2 * 4 / (4 + 5))  # four words in common, of four and of five


def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(STORIES)
    texts = ("Tom", "Once upon a time, there was a little girl who", "Lily went to the park. She saw", "The")
    return [tokenizer(text)["input_ids"] for text in texts]


def test_answers_in_batches_are_those_of_every_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(STORIES, dtype="float32")
    monkeypatch.setattr(rouge, "NEW_TOKENS", 12)
    sizes: list[int] = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **options: sizes.append(len(options["input_ids"])) or generate(**options)
    )
    together = greedy_answers(model, prompts(), CPU, [], 0)
    assert sizes == [1, 2, 4]  # the test of padding, and all of them at once
    assert together == [greedy_answers(model, [prompt], CPU, [], 0)[0] for prompt in prompts()]
    stop = together[1][5]
    shorter = greedy_answers(model, prompts(), CPU, [stop], 0)[1]
    assert shorter == together[1][: together[1].index(stop) + 1]


def test_a_model_that_padding_disturbs_answers_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(STORIES, dtype="float32")
    generate = model.generate
    sizes: list[int] = []

    def blind(**options: Any) -> Any:
        """Sees the padding as if it were text."""
        sizes.append(len(options["input_ids"]))
        return generate(**options | {"attention_mask": torch.ones_like(options["attention_mask"])})

    monkeypatch.setattr(model, "generate", blind)
    monkeypatch.setattr(rouge, "NEW_TOKENS", 4)
    short, long = prompts()[0], prompts()[1]
    assert not ignores_padding(model, short, long, CPU, 0)
    assert ignores_padding(model, short, short, CPU, 0)
    sizes.clear()
    greedy_answers(model, prompts(), CPU, [], 0)
    assert sizes == [1, 2, 1, 1, 1, 1]
