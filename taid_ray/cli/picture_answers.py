"""Answers of vision-language models to questions on pictures, through nothing but transformers."""

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from taid_ray.demo.scenes import KINDS, SIDE, Talk, draw
from taid_ray.media.processor import grey_picture

NEW_TOKENS = 8
"""Length of an answer at most; the longest right one has four tokens."""


@torch.no_grad()
def answers(model: Any, processor: Any, pictures: Sequence[bytes], questions: Sequence[str]) -> list[str]:
    """Generates the likeliest answer to each question on its picture.

    processor: that of transformers. Questions of the same length are answered together, so that nothing is ever padded.
    """
    from PIL import Image

    prompts = [_prompt(processor, question) for question in questions]
    groups = defaultdict(list)
    for number, prompt in enumerate(prompts):
        groups[len(processor.tokenizer(prompt)["input_ids"])].append(number)
    found = [""] * len(prompts)
    for group in groups.values():
        shown = [Image.open(io.BytesIO(pictures[number])) for number in group]
        inputs = processor(text=[prompts[number] for number in group], images=shown, return_tensors="pt")
        tokenizer = processor.tokenizer
        stop = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        tokens = model.eval().generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **stop)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in zip(group, texts, strict=True):
            found[number] = text
    return found


def _prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def scene_answers(model: Any, processor: Any, made: Sequence[Talk], grey: bool) -> list[str]:
    """Generates answers to the first question on each scene. grey: every picture is nothing but grey."""
    pictures = [grey_picture(SIDE, SIDE)] * len(made) if grey else [draw(scene) for scene, _ in made]
    return answers(model, processor, pictures, [questions[0].text for _, questions in made])


def shares_right(made: Sequence[Talk], found: Sequence[str]) -> dict[str, float]:
    """Computes the share of answers that are right, word by word: of each kind of question, and of `all`."""
    right: dict[str, list[bool]] = {kind: [] for kind in (*KINDS, "all")}
    for (_, questions), answer in zip(made, found, strict=True):
        for kind in (questions[0].kind, "all"):
            right[kind].append(answer == questions[0].answer)
    return {kind: sum(each) / len(each) for kind, each in right.items()}
