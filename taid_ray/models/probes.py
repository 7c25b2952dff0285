"""What a model is probed with: fixed tokens in a few layouts, and the hidden states that the model computes of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid_ray.models.head import Head, computes_one_row, hidden_states

PROBE_ROWS, PROBE_LENGTH = 2, 16
LONG_PROBE = {"cpu": 128, "cuda": 1024}
"""Longest row (positions) that is probed on a kind of device; `data.sequence_length` where that is less."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference, relative to the largest value, between two ways to compute the same in one precision."""


@dataclass(frozen=True)
class Probe:
    """A model to be tested."""

    name: str
    section: str
    """Section of the configuration that names it: teacher or student."""
    compute: Callable[[dict[str, Tensor]], Tensor]
    """Hidden states [B, T, H] of inputs [B, T], as training computes them."""
    vocab_rows: int
    device: torch.device
    everywhere: Callable[[bool], bool] = bool
    """Tells whether something holds in all processes that compute the model together, so that all go the same way."""
    one_row: bool = False
    """All rows of a batch are computed as one, see `head.computes_one_row`."""
    embedding: Any = None
    """The module that embeds the tokens; None where no gradient may be computed."""
    mixture: bool = False
    """The model sends its tokens to experts."""

    def of_documents(self, ids: Tensor, packed: bool) -> Tensor:
        """Hidden states [D, T, H] of documents [D, T], each in a row of its own or, packed, two in each row."""
        documents, length = ids.shape
        shape = (documents // 2, 2 * length) if packed else (documents, length)
        positions = torch.arange(length, device=self.device).expand(documents, -1)
        inputs = {"input_ids": ids.reshape(shape), "position_ids": positions.reshape(shape)}
        return self.compute(inputs).reshape(documents, length, -1)


def probe_inputs(vocab_rows: int, device: torch.device) -> dict[str, Tensor]:
    """Makes fixed pseudo-random tokens, [PROBE_ROWS, PROBE_LENGTH]."""
    ids = torch.arange(PROBE_ROWS * PROBE_LENGTH, device=device).view(PROBE_ROWS, PROBE_LENGTH) * 7919 % vocab_rows
    return {"input_ids": ids, "position_ids": torch.arange(PROBE_LENGTH, device=device).expand(PROBE_ROWS, -1)}


def probe_of(model: Any, head: Head, section: str, one_row: bool | None = None) -> Probe:
    """The probe of a transformers model. section: its section of the configuration. one_row: as in `hidden_states`."""
    joined = computes_one_row(model) if one_row is None else one_row
    rows, device = head.weight.shape[0], head.weight.device
    return Probe(
        name=type(model).__name__,
        section=section,
        compute=lambda inputs: hidden_states(model, inputs, joined),
        vocab_rows=rows,
        device=device,
        one_row=joined,
        embedding=model.get_input_embeddings(),
        mixture=is_mixture(model),
    )


def is_mixture(model: Any) -> bool:
    """Tells, by the names of its modules, whether a model sends its tokens to experts."""
    return any("expert" in name or "moe" in name for name, _ in model.named_modules())


def long_probe(device: torch.device, *limits: int) -> int:
    """Length of the longest rows that are probed on a device, in positions: LONG_PROBE, or the least of `limits`."""
    return max(PROBE_LENGTH, min(LONG_PROBE["cpu" if device.type == "cpu" else "cuda"], *limits))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Computes the largest difference of two tensors, relative to the largest value of the expected one."""
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def not_finite(dtype: torch.dtype, section: str) -> str:
    """Says that values of a model are not finite, and what helps in its dtype. section: as in `Probe`."""
    name = str(dtype).removeprefix("torch.")
    remedy = f"set {section}.dtype: bfloat16"
    if dtype != torch.float16:
        remedy = f"check the weights in the checkpoint of {section}.model"
    return f"not finite in {name}; {remedy}"


def of_the_machine(error: BaseException) -> bool:
    """Tells whether an error is the machine's and not the model's: no memory, or a failure of a device."""
    special = isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError)
    return special or any(word in str(error) for word in ("CUDA", "can't allocate memory"))


@contextmanager
def attention_that_runs(model: Any, device: torch.device) -> Iterator[None]:
    """Replaces flash attention by sdpa, meanwhile, for a model that is not on a GPU yet."""
    chosen = getattr(model.config, "_attn_implementation", None)
    replaced = computes_one_row(model) and device.type == "cpu"
    if replaced:
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if replaced:
            model.config._attn_implementation = chosen
