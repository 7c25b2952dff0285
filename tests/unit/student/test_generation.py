"""Greedy answers: the same in batches and alone, and those of transformers where prompts have images."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from taid_ray.config.schema import TeacherConfig
from taid_ray.data.packing import Sample
from taid_ray.media.opening import open_image
from taid_ray.media.pictures import Pictures
from taid_ray.models.loading import load_causal_lm, load_tokenizer
from taid_ray.student import generation
from taid_ray.student.generation import Prompt, answers, greedy_answers, ignores_padding, prompt_of
from tests.support.paths import BUNDLE
from tests.support.tiny_vision import content_of, row_ids, tiny_media, tiny_model

STORIES = TeacherConfig(model=str(BUNDLE / "stories260k"))
CPU = torch.device("cpu")


class Parrot:
    """Answers every prompt with fixed tokens."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def generate(self, input_ids: Any, **options: Any) -> Any:
        return torch.cat([input_ids, torch.tensor([self.answer])], 1)


def test_an_answer_stands_beside_its_response() -> None:
    tokenizer = load_tokenizer(STORIES)
    prompt, response, other = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("Tom went to the park.", "It was a sunny day.", "It was a day.")
    )
    sample = Sample(
        [*prompt, *response, *prompt], [False] * len(prompt) + [True] * len(response) + [False] * len(prompt)
    )
    assert answers(Parrot(other), tokenizer, [sample], CPU) == [("It was a sunny day.", "It was a day.")]


def prompts() -> list[Prompt]:
    tokenizer = load_tokenizer(STORIES)
    texts = ("Tom", "Once upon a time, there was a little girl who", "Lily went to the park. She saw", "The")
    return [Prompt(tokenizer(text)["input_ids"]) for text in texts]


def test_answers_in_batches_are_those_of_every_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(STORIES, dtype="float32")
    monkeypatch.setattr(generation, "NEW_TOKENS", 12)
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
    monkeypatch.setattr(generation, "NEW_TOKENS", 4)
    short, long = prompts()[0].ids, prompts()[1].ids
    assert not ignores_padding(model, short, long, CPU, 0)
    assert ignores_padding(model, short, short, CPU, 0)
    sizes.clear()
    greedy_answers(model, prompts(), CPU, [], 0)
    assert sizes == [1, 2, 1, 1, 1, 1]


SHOWN: list[tuple[str | tuple[int, int], ...]] = [
    ("Tom saw", (30, 60), "a big dog."), ("She ran home",), ((60, 30), "one", (28, 28), "two", (50, 90), "three"), ("no",),
    ((90, 30), "and she"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "smolvlm"])
@torch.no_grad()
def test_answers_to_images_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processor on text and images, and its `generate`, on one prompt after another in another order."""
    monkeypatch.setattr(generation, "NEW_TOKENS", 6)
    media, model = tiny_media(name), tiny_model(name)
    pad = media.processor.tokenizer.eos_token_id
    asked = [Prompt(ids, tuple(images)) for ids, images in (row_ids(media, *parts) for parts in SHOWN)]
    generate, logits = model.generate, list[torch.Tensor]()

    def recorded(**options: Any) -> Any:
        found = generate(**options, output_logits=True, return_dict_in_generate=True)
        logits.append(torch.stack(found.logits))
        return found.sequences

    with monkeypatch.context() as patch:
        patch.setattr(generation, "ignores_padding", lambda *_: False)
        patch.setattr(model, "generate", recorded)
        found = greedy_answers(model, asked, CPU, [], pad, Pictures(media, content_of))
    shown_last = sorted(range(len(asked)), key=lambda number: bool(asked[number].images))  # texts come first, by length
    recorded_by = {number: each for number, each in zip(shown_last, logits, strict=True) if asked[number].images}
    for number in reversed(range(len(asked))):
        parts, prompt = SHOWN[number], asked[number]
        text = "".join(part if isinstance(part, str) else media.processor.image_token for part in parts)
        pixels = [open_image(content_of(ref), ref.width, ref.height, "") for ref in prompt.images]
        shown = {"images": [pixels]} if pixels else {}
        inputs = media.processor(text=[text], **shown, return_tensors="pt", add_special_tokens=False)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": pad}
        own = generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        assert own.sequences[0].tolist() == prompt.ids + found[number]
        if pixels:
            torch.testing.assert_close(recorded_by[number], torch.stack(own.logits), rtol=1e-5, atol=1e-6)
    assert len({tuple(answer) for answer in found}) > 2


def test_a_prompt_has_the_images_in_front_of_the_response() -> None:
    media = tiny_media("llava")
    ids, images = row_ids(media, "a", (28, 28), "b", (30, 28), "c")
    last = images[1].start
    mask = [False] * last + [False] * images[1].tokens + [True] * (len(ids) - last - images[1].tokens)
    prompt, response = prompt_of(Sample(ids, mask, 1, tuple(images)))
    assert prompt.images == tuple(images) and ids == prompt.ids + response
    mask[images[0].start + images[0].tokens] = True  # the answer "b"
    prompt, response = prompt_of(Sample(ids, mask, 1, tuple(images)))
    assert prompt.images == (images[0],) and replace(images[0], start=0) != images[1]
    assert len(prompt.ids) == images[0].start + images[0].tokens
