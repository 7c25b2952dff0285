"""Samples of the training data as a person can read them: their text, and which parts of it carry loss."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from taid_ray.data.packing import Sample


@dataclass(frozen=True)
class Part:
    """A run of neighbouring tokens of a sample, as text, all of which carry loss or none."""

    text: str
    has_loss: bool
    """False for an image, whose text is `[image WIDTHxHEIGHT]`."""


@dataclass(frozen=True)
class SamplePreview:
    """One sample (a document, a piece of one, or a conversation) as text, special tokens included."""

    row: int
    """Number of its document in the data, from 1."""
    parts: list[Part]
    """In order; together they are the whole sample."""
    tokens: int
    loss_tokens: int
    source: str = ""
    """Name of the source of training data, if there are several."""
    images: tuple[str, ...] = ()
    """Where its images are, in order."""

    def to_dict(self) -> dict[str, Any]:
        """Returns row, text, loss_text (a string for each part that carries loss), tokens, loss_tokens.

        Also source, if named, and images, if any.
        """
        named = {"source": self.source} if self.source else {}
        return (
            named
            | {
                "row": self.row,
                "text": "".join(part.text for part in self.parts),
                "loss_text": [part.text for part in self.parts if part.has_loss],
                "tokens": self.tokens,
                "loss_tokens": self.loss_tokens,
            }
            | ({"images": list(self.images)} if self.images else {})
        )


def preview(sample: Sample, tokenizer: PreTrainedTokenizerBase, source: str = "") -> SamplePreview:
    """Decodes a sample of the source of that name.

    A token carries loss if it is to be predicted, which the first one of a sample never is.
    """
    mask = [False, *sample.loss_mask[1:]]
    parts, done = [], 0
    for image in sample.images:
        parts += _parts(sample.input_ids, mask, done, image.start, tokenizer)
        parts.append(Part(f"[image {image.width}x{image.height}]", has_loss=False))
        done = image.start + image.tokens
    parts += _parts(sample.input_ids, mask, done, len(mask), tokenizer)
    places = tuple(image.place.removeprefix("file:") for image in sample.images)
    return SamplePreview(sample.document, parts, len(mask), sample.num_loss_tokens, source, places)


def _parts(ids: list[int], mask: list[bool], start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    """Decodes a range of tokens without images."""
    parts = []
    for has_loss, run in groupby(mask[start:stop]):
        end = start + len(list(run))
        parts.append(Part(_text_between(ids, start, end, tokenizer), has_loss))
        start = end
    return parts


def _text_between(ids: list[int], start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decodes tokens in their context, because some tokenizers drop the space before the first token that they decode."""

    def decoded(first: int, last: int) -> str:
        text = tokenizer.decode(ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    before, upto = decoded(0, start), decoded(0, stop)
    # A character can be cut in two where the loss begins; then the part is decoded on its own.
    return upto[len(before) :] if upto.startswith(before) else decoded(start, stop)
