"""The same as the package computes, by transformers and torch alone: document by document, from the model's own logits."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.architectures.tiny import tokenizer
from tests.support.paths import BUNDLE

LENGTHS = (9, 90, 30, 64, 17, 80, 41, 5, 72, 12, 55, 26)
"""Lengths of the documents, in tokens, without the token that ends them."""


def texts() -> list[str]:
    """Beginnings of the bundled stories, of LENGTHS."""
    with (BUNDLE / "tinystories_valid.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["text"][:length] for line, length in zip(lines, LENGTHS, strict=False)]


def documents(longest: int | None = None) -> list[Tensor]:
    """The texts as token ids with the token that ends them, each [1, length]; the first `longest` of each."""
    encode = tokenizer()
    return [torch.tensor([[*encode(text)["input_ids"], encode.eos_token_id]])[:, :longest] for text in texts()]


def load(directory: Path, **options: Any) -> Any:
    """The model as transformers alone loads it, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@torch.no_grad()
def cross_entropy(directory: Path, dtype: str) -> float:
    """Mean cross-entropy of the next token over all documents."""
    model = load(directory, dtype=dtype)
    losses = [
        F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), ids[0, 1:], reduction="none")
        for ids in documents()
    ]
    return float(torch.cat(losses).mean())


def gradients(student: Path, teacher: Path, rows: list[Tensor], t: float, sft_weight: float) -> dict[str, Tensor]:
    """Gradients of (1 - w) KL(p_t || q) + w CE, summed over the loss positions of all rows, by autograd, in float32."""
    model = load(student, dtype=torch.float32).train()
    other = load(teacher, dtype=torch.float32)
    for ids in rows:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        with torch.no_grad():
            p = torch.softmax((1 - t) * logits + t * other(input_ids=ids, use_cache=False).logits[0, :-1], -1)
        log_q = logits.log_softmax(-1)
        kl = (p * (p.log() - log_q)).sum()
        ((1 - sft_weight) * kl - sft_weight * log_q.gather(-1, ids[0, 1:, None]).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of a parameter's gradient, relative to its norm; where that is small, to 1e-3 of the whole norm."""
    zero = torch.zeros(())
    floor = 1e-3 * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    pairs = [(found.get(name, zero), expected.get(name, zero)) for name in found.keys() | expected.keys()]
    return max(float((ours - theirs).norm()) / max(float(theirs.norm()), floor) for ours, theirs in pairs)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
