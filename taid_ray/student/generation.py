"""Greedy answers of a model to prompts, of text in batches, with images one by one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taid_ray.data.packing import Sample
from taid_ray.media.pictures import Pictures
from taid_ray.media.refs import ImageRef
from taid_ray.models.stopping import own_stop_ids

NEW_TOKENS = 128
"""Length of an answer at most."""
BATCH_PROMPTS = 16
PADDING_TOLERANCE = 0.02
"""Largest change of a logit by padding, as a share of the largest logit, that rounding may explain, also in bfloat16."""


class Prompt(NamedTuple):
    """What a model is to continue."""

    ids: list[int]
    """Its tokens, those of its images included."""
    images: tuple[ImageRef, ...] = ()
    """Its images, in the order of their tokens."""


def prompt_of(sample: Sample) -> tuple[Prompt, list[int]]:
    """Cuts a sample into what stands before its first response, and the tokens of that response."""
    start = sample.loss_mask.index(True)
    stop = start + next((i for i, kept in enumerate(sample.loss_mask[start:]) if not kept), len(sample.loss_mask))
    images = tuple(image for image in sample.images if image.start < start)
    return Prompt(sample.input_ids[:start], images), sample.input_ids[start:stop]


def answers(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    device: torch.device,
    stop_ids: Sequence[int] = (),
    pictures: Pictures | None = None,
) -> list[tuple[str, str]]:
    """Lets a model answer each sample's prompt greedily. Returns texts: the first response of each sample, and the answer.

    stop_ids: tokens at which an answer ends, beside the model's own. pictures: makes the model's inputs of images, where samples
    have some; raises DataError for one that cannot be read or decoded.
    """
    prompts, responses = zip(*map(prompt_of, samples), strict=True)
    pad_id = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    found = greedy_answers(model, prompts, device, stop_ids, pad_id, pictures)
    decode = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in side] for side in (responses, found)]
    return list(zip(*decode, strict=True))


@torch.no_grad()
def greedy_answers(
    model: Any,
    prompts: Sequence[Prompt],
    device: torch.device,
    stop_ids: Sequence[int],
    pad_id: int,
    pictures: Pictures | None = None,
) -> list[list[int]]:
    """Generates the likeliest tokens after each prompt, up to NEW_TOKENS or the first stop token, which is the last one then.

    Prompts of text of similar length are computed together, padded on the left; one by one with a model that padding disturbs.
    Those with images are computed one by one. stop_ids: beside the model's own. pictures: as in `answers`.
    """
    stops = list(dict.fromkeys([*own_stop_ids(model), *stop_ids]))
    options = {"eos_token_id": stops or None, "pad_token_id": pad_id, "do_sample": False, "max_new_tokens": NEW_TOKENS}
    texts = [number for number, prompt in enumerate(prompts) if not prompt.images]
    groups = _together(model, prompts, texts, device, pad_id)
    groups += [[number] for number, prompt in enumerate(prompts) if prompt.images]
    found: list[list[int]] = [[]] * len(prompts)
    for group in groups:
        first = prompts[group[0]]
        if first.images:
            inputs = _shown(model, first, device, pictures)
        else:
            inputs = left_padded([prompts[number].ids for number in group], device, pad_id)
        generated = model.generate(**inputs, **options)
        for number, ids in zip(group, generated[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
            found[number] = ids[:end]
    return found


def _together(
    model: Any, prompts: Sequence[Prompt], texts: Sequence[int], device: torch.device, pad_id: int
) -> list[list[int]]:
    """Groups the numbers of prompts of text that are computed together."""
    order = sorted(texts, key=lambda number: len(prompts[number].ids))
    padded = len(order) > 1 and ignores_padding(model, prompts[order[0]].ids, prompts[order[-1]].ids, device, pad_id)
    size = BATCH_PROMPTS if padded else 1
    return [order[start : start + size] for start in range(0, len(order), size)]


def _shown(model: Any, prompt: Prompt, device: torch.device, pictures: Pictures | None) -> dict[str, Tensor]:
    """Makes the inputs of `generate` for a prompt with images.

    The positions are among them: a model with positions of three coordinates would else go by what it kept of an earlier call.
    """
    assert pictures is not None, "prompts with images need what processes them"
    ids = torch.tensor([prompt.ids])
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
    inputs = pictures.inputs(inputs, (prompt.images,)) | {"attention_mask": torch.ones_like(ids)}
    return placed(inputs, device, model.dtype)


def placed(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Brings model inputs to the model's device, and pixels to its dtype."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


def ignores_padding(model: Any, short: list[int], long: list[int], device: torch.device, pad_id: int) -> bool:
    """Tests whether the first token after the short prompt is as likely beside the long one as alone."""
    if len(short) == len(long):
        return True
    alone, padded = (
        model.generate(
            **left_padded(prompts, device, pad_id),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=pad_id,
            output_logits=True,
            return_dict_in_generate=True,
        ).logits[0][0]
        for prompts in ([short], [short, long])
    )
    return float((alone - padded).abs().max()) <= PADDING_TOLERANCE * float(alone.abs().max())


def left_padded(prompts: Sequence[list[int]], device: torch.device, pad_id: int) -> dict[str, Tensor]:
    """Makes the inputs of `generate`, [B, T] each, whose mask excludes the padding on the left."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
