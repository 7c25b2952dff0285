"""ROUGE-L of a model's greedy answers to held-out prompts, generated in batches."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from taid_ray.config.data import DataSource
from taid_ray.data.dataset import open_validation
from taid_ray.data.encoding import Encoder
from taid_ray.data.packing import Sample
from taid_ray.errors import ConfigError, DataError
from taid_ray.models.stopping import own_stop_ids

NEW_TOKENS = 128
"""Length of an answer at most."""
BATCH_PROMPTS = 16
PADDING_TOLERANCE = 0.02
"""Largest change of a logit by padding, as a share of the largest logit, that rounding may explain, also in bfloat16."""


def check_rouge_score(what: str) -> None:
    """Raises ConfigError if the package rouge-score is missing. what: the thing that needs it, as the error says."""
    if find_spec("rouge_score") is None:
        raise ConfigError(f"{what} needs the package rouge-score; run `pip install 'taid-ray[eval]'`")


def conversations(data: DataSource, tokenizer: Any, documents: int) -> tuple[list[Sample], list[int]]:
    """Reads what the first `documents` rows of the validation data ask, and the ids of the tokens that end answers.

    Of each row the first sample, see `prompt_of`. Raises DataError if no row fits into data.sequence_length.
    """
    data = data.model_copy(update={"loss_on": "response"})  # whatever carries loss, it is responses that are generated
    source = f"{data.key}: {data.train}" if data.valid is None else f"{data.valid_key}: {data.valid}"
    first_row, columns = next(open_validation(data).blocks(0, documents))
    encoder = Encoder(data, tokenizer, source)
    first: dict[int, Sample] = {}
    for sample in encoder.encode(columns, first_row):
        first.setdefault(sample.document, sample)
    if not first:
        raise DataError(f"{source}: none of the first {documents} rows fits into data.sequence_length; make it larger")
    return list(first.values()), encoder.stop_ids()


def prompt_of(sample: Sample) -> tuple[list[int], list[int]]:
    """Cuts a sample into the tokens before its first response, and the tokens of that response."""
    start = sample.loss_mask.index(True)
    stop = start + next((i for i, kept in enumerate(sample.loss_mask[start:]) if not kept), len(sample.loss_mask))
    return sample.input_ids[:start], sample.input_ids[start:stop]


def rouge_scores(
    model: Any, tokenizer: Any, samples: Sequence[Sample], device: torch.device, stop_ids: Sequence[int] = ()
) -> list[float]:
    """Computes ROUGE-L F1 (0 to 1) of a greedy answer to each sample's prompt against its first response.

    stop_ids: tokens at which an answer ends, beside the model's own. Needs the package rouge-score, which stems words.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    prompts, responses = zip(*map(prompt_of, samples), strict=True)
    answers = greedy_answers(model, prompts, device, stop_ids, tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    scores = []
    for pair in zip(responses, answers, strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in pair]
        scores.append(float(scorer.score(*texts)["rougeL"].fmeasure))
    return scores


@torch.no_grad()
def greedy_answers(
    model: Any, prompts: Sequence[list[int]], device: torch.device, stop_ids: Sequence[int], pad_id: int
) -> list[list[int]]:
    """Generates the likeliest tokens after each prompt, up to NEW_TOKENS or the first stop token, which is the last one then.

    Prompts of similar length are computed together, padded on the left; one by one with a model that padding disturbs.
    stop_ids: beside the model's own.
    """
    stops = list(dict.fromkeys([*own_stop_ids(model), *stop_ids]))
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    together = len(prompts) > 1 and ignores_padding(model, prompts[order[0]], prompts[order[-1]], device, pad_id)
    size = BATCH_PROMPTS if together else 1
    answers: list[list[int]] = [[]] * len(prompts)
    for start in range(0, len(order), size):
        group = order[start : start + size]
        inputs = left_padded([prompts[number] for number in group], device, pad_id)
        options = {"eos_token_id": stops or None, "pad_token_id": pad_id, "do_sample": False}
        generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)
        for number, ids in zip(group, generated[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
            answers[number] = ids[:end]
    return answers


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
