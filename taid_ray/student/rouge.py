"""Figures of a model's answers to held-out prompts: ROUGE-L, and how many are the response itself."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from taid_ray.config.data import DataSource
from taid_ray.data.dataset import open_validation, with_places
from taid_ray.data.encoding import Encoder
from taid_ray.data.images import EncoderMedia
from taid_ray.data.packing import Sample
from taid_ray.errors import ConfigError, DataError


def check_rouge_score(what: str) -> None:
    """Raises ConfigError if the package rouge-score is missing. what: the thing that needs it, as the error says."""
    if find_spec("rouge_score") is None:
        raise ConfigError(f"{what} needs the package rouge-score; run `pip install 'taid-ray[eval]'`")


def conversations(
    data: DataSource, tokenizer: Any, documents: int, media: EncoderMedia | None = None
) -> tuple[list[Sample], list[int]]:
    """Reads what the first `documents` rows of the validation data ask, and the ids of the tokens that end answers.

    Of each row the first sample, see `generation.prompt_of`. media: as in `validation_rows`. Raises DataError if no row fits into
    data.sequence_length.
    """
    data = data.model_copy(update={"loss_on": "response"})  # whatever carries loss, it is responses that are generated
    source = f"{data.key}: {data.train}" if data.valid is None else f"{data.valid_key}: {data.valid}"
    first_row, columns = next(open_validation(data).blocks(0, documents))
    encoder = Encoder(data, tokenizer, source, media)
    first: dict[int, Sample] = {}
    for sample in encoder.encode(columns, first_row):
        first.setdefault(sample.document, sample)
    if not first:
        raise DataError(f"{source}: none of the first {documents} rows fits into data.sequence_length; make it larger")
    found = [replace(each, images=with_places(each.images, data.images_directory)) for each in first.values()]
    return found, encoder.stop_ids()


def rouge_l(answered: Sequence[tuple[str, str]]) -> list[float]:
    """Computes ROUGE-L F1 (0 to 1) of each answer against its response. Needs the package rouge-score, which stems words.

    answered: of `generation.answers`.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [float(scorer.score(response, answer)["rougeL"].fmeasure) for response, answer in answered]


def exact_match(answered: Sequence[tuple[str, str]]) -> list[float]:
    """Tells of each answer whether it is its response (1.0, else 0.0), without space around them, in upper or lower case.

    answered: as in `rouge_l`.
    """
    return [float(response.strip().casefold() == answer.strip().casefold()) for response, answer in answered]
