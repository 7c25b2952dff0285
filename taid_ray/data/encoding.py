"""Encoding of documents as samples: their tokens, and which of them carry loss. One block of documents at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from taid_ray.config.data import DataSource
from taid_ray.data.answers import AnswerRenderer
from taid_ray.data.expansions import expanded, shortened_to
from taid_ray.data.images import EncoderMedia, FoundImage, ImageSource, RowImages, SeenImage, UnusableRow
from taid_ray.data.messages import shown
from taid_ray.data.packing import Sample, cut
from taid_ray.data.turns import Span, inside
from taid_ray.errors import DataError

BAD_SAID = 3
"""Documents dropped for an image of which it is said why."""
Columns = dict[str, list[Any]]
"""Some consecutive documents, column by column."""


@dataclass
class Counts:
    """Numbers of the documents read so far, by what became of them."""

    documents: int = 0
    dropped: int = 0
    """Documents that gave no sample: overlong with `overlong: drop`, empty, or their response truncated away."""
    truncated: int = 0
    """Documents shortened by `overlong: truncate` that kept some of their loss positions."""
    empty_answers: int = 0
    """Answers without text or tool call."""
    images: int = 0
    """Images of the documents that were not dropped for one."""
    bad_images: int = 0
    """Documents among those dropped that had an image which cannot be used, with `bad_images: drop`."""

    def to_dict(self) -> dict[str, int]:
        """Returns the numbers; those about images only if there were some."""
        return {name: number for name, number in asdict(self).items() if number or "images" not in name}

    @property
    def has_images(self) -> bool:
        """Tells whether there was an image, used or not."""
        return self.images + self.bad_images > 0


def said_of_bad(bad: Sequence[tuple[int, str]]) -> str:
    """Lists rows that were dropped for an image, with what is wrong."""
    return "; ".join(f"row {row}: {reason}" for row, reason in bad)


@dataclass(frozen=True)
class _Text:
    """A document, or a part of it, as text."""

    row: int
    text: str
    spans: Sequence[Span]
    """Ranges of characters of its responses."""
    images: Sequence[FoundImage] = ()
    """Those for which the text has the image token, in order."""


class Encoder:
    """Turns documents into samples of at most `config.sequence_length` tokens, each with at least one loss position."""

    def __init__(
        self,
        config: DataSource,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        media: EncoderMedia | None = None,
    ) -> None:
        """Prepares for one source of data, by whose key and name (`source`) every error begins.

        media: for a run with images, and only then. Raises DataError if the tokenizer cannot serve.
        """
        assert config.images_column is None or media is not None, "rows with images need to know their tokens"
        self.counts = Counts()
        self._config, self._tokenizer, self._source = config, tokenizer, source
        if config.format != "text" and not tokenizer.is_fast:
            raise DataError(
                f"data.format: {config.format} needs a fast tokenizer (tokenizer.json), to find the response among the "
                f"tokens; {tokenizer.name_or_path!r} has none. Convert the tokenizer, or use data.format: text."
            )
        templated = config.chat_template is not None or tokenizer.chat_template
        plain = config.format == "text" or (config.format == "prompt_response" and not templated)
        self._media = media
        self._image_token = None if media is None else str(tokenizer.convert_ids_to_tokens(media.tokens.image_token_id))
        self._answers = None if plain else AnswerRenderer(config, tokenizer, self._image_token)
        self._images = ImageSource(config, media) if media is not None and config.images_column else None
        self.bad: list[tuple[int, str]] = []
        """Rows that were dropped for an image, and why, the first few."""

    def encode(self, columns: Columns, first_row: int) -> list[Sample]:
        """Encodes some consecutive documents as samples, in order. `first_row` is the first one's number, counted from 1.

        Raises DataError, naming the row, for a value of a wrong type, a row without loss position, or (with
        `overlong: error`) a row that is too long.
        """
        count = len(next(iter(columns.values())))
        self.counts.documents += count
        if self._config.format == "text":
            return self._encode_plain(columns[self._config.text_column], first_row)
        texts = [
            text
            for i in range(count)
            for text in self._as_texts({name: values[i] for name, values in columns.items()}, first_row + i)
        ]
        by_row = groupby(self._tokenize(texts), key=lambda sample: sample.document)
        return [sample for _, samples in by_row for sample in self._fitting(list(samples))]

    @property
    def image_bytes(self) -> Mapping[str, int]:
        """Bytes of the images so far, by their digests."""
        return {} if self._images is None else self._images.bytes

    @property
    def images_outside(self) -> Mapping[str, SeenImage]:
        """The files of images that were asked for so far, by their places."""
        return {} if self._images is None else self._images.outside

    def stop_ids(self) -> list[int]:
        """Lists the ids of the tokens that end what was encoded so far: answers, or documents of `format: text`."""
        if self._answers is not None:
            return self._answers.stop_ids()
        eos = self._tokenizer.eos_token_id
        return [] if eos is None else [eos]

    def description(self) -> list[str]:
        """Says in sentences how documents become tokens, and how those so far were understood."""
        if self._answers is not None:
            return self._answers.description()
        end = self._tokenizer.eos_token
        what = "document" if self._config.format == "text" else "response"
        loss = "all tokens" if self._config.format == "text" or self._config.loss_on == "all" else "the responses"
        said = [] if self._config.format == "text" else ["chat template: none; a line break stands before the response"]
        return [*said, f"a {what} ends with: {end}" if end else f"no token ends a {what}", f"loss on {loss}"]

    def notes(self) -> list[str]:
        """Says in sentences what of the documents so far may not be meant."""
        said = self._answers.notes() if self._answers is not None else []
        if empty := self.counts.empty_answers:
            said.append(
                f"{empty} answer(s) are empty, and the student learns to say nothing there; remove them if not meant"
            )
        if bad := self.counts.bad_images:
            said.append(
                f"{bad} row(s) were left out for an image (data.bad_images: drop), for example: {said_of_bad(self.bad)}"
            )
        return said

    def _encode_plain(self, texts: list[Any], first_row: int) -> list[Sample]:
        column = self._config.text_column
        for row, text in enumerate(texts, first_row):
            self._require_text(text, row, column, "data.text_column")
        eos = self._tokenizer.eos_token_id
        samples = []
        encoded = self._tokenized(texts, range(first_row, first_row + len(texts)))
        for row, tokens in enumerate(encoded["input_ids"], first_row):
            if eos is not None and tokens[-1:] != [eos]:  # some tokenizers append it themselves
                tokens.append(eos)
            self._with_images(Sample(tokens, [], row), [])
            pieces = cut(tokens, self._config.sequence_length, row)
            self.counts.dropped += not pieces
            samples.extend(pieces)
        return samples

    def _as_texts(self, document: dict[str, Any], row: int) -> list[_Text]:
        """Renders one chat or prompt/response document as texts, and locates its responses in them."""
        where = f"{self._source}: row {row}"
        if self._config.format == "chat":
            return self._chat_texts(document, row, where)
        prompt, response = self._prompt(document, row), document[self._config.response_column]
        self._require_text(response, row, self._config.response_column, "data.response_column")
        if self._answers is None:
            text = f"{prompt}\n{response}"
            self.counts.empty_answers += not response.strip()
            return [_Text(row, text, [(len(prompt) + 1, len(text))])]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        found = self._answers.render(messages, None, where)
        self.counts.empty_answers = self._answers.counts.empty
        return [_Text(row, each.text, [turn.span for turn in each.turns]) for each in found]

    def _chat_texts(self, document: dict[str, Any], row: int, where: str) -> list[_Text]:
        """Renders a conversation with its images; no text for one that is dropped for an image."""
        assert self._answers is not None
        column, images = self._config.images_column, None
        if self._images is not None and column is not None:
            images = RowImages(self._images, document.get(column), where)
        try:
            found = self._answers.conversation(document, where, images)
        except UnusableRow as error:
            if self._config.bad_images == "error":
                raise DataError(
                    f"{where}: {error}. Mend or remove it, or set data.bad_images: drop to leave such rows out."
                ) from None
            self.bad += [(row, str(error))] * (len(self.bad) < BAD_SAID)
            self.counts.dropped += 1
            self.counts.bad_images += 1
            return []
        self.counts.empty_answers = self._answers.counts.empty
        self.counts.images += len(images.found) if images is not None else 0
        return [
            _Text(row, each.text, [turn.span for turn in each.turns], self._shown(each.text, images)) for each in found
        ]

    def _shown(self, text: str, images: RowImages | None) -> Sequence[FoundImage]:
        """The images that a text of a conversation shows, which may end before the last one."""
        return [] if images is None or not images.found else images.found[: text.count(self._image_token or "")]

    def _prompt(self, document: dict[str, Any], row: int) -> str:
        parts = [(name, document[name]) for name in self._config.prompt_columns]
        for name, value in parts:
            if value is not None:  # an absent input is an empty one
                self._require_text(value, row, name, "data.prompt_columns")
        return "\n\n".join(value for _, value in parts if value)

    def _tokenize(self, texts: list[_Text]) -> list[Sample]:
        """Tokenises each text once, as a whole; spans become loss masks through the tokens' character offsets.

        A template writes its special tokens itself. Without one the tokenizer adds its own and EOS ends the response.
        """
        plain = self._answers is None
        if not texts:  # all documents were dropped
            return []
        encoded = self._tokenized(
            [text.text for text in texts],
            [text.row for text in texts],
            add_special_tokens=plain,
            return_offsets_mapping=True,
        )
        samples = []
        for text, tokens, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            everything = self._config.loss_on == "all"
            mask = [True] * len(tokens) if everything else inside(offsets, text.spans)
            if plain and self._tokenizer.eos_token_id is not None:
                if tokens[-1:] == [self._tokenizer.eos_token_id]:
                    mask[-1] = True
                else:
                    tokens.append(self._tokenizer.eos_token_id)
                    mask.append(True)
            samples.append(self._with_images(Sample(tokens, [False, *mask[1:]], text.row), text.images))
        return samples

    def _with_images(self, sample: Sample, images: Sequence[FoundImage]) -> Sample:
        """Puts the tokens of the images into a sample. Raises DataError for the token of an image that is not there."""
        if self._media is None:
            return sample
        tokens = self._media.tokens
        if (count := sample.input_ids.count(tokens.image_token_id)) != len(images):
            raise DataError(
                f"{self._source}: row {sample.document} has {self._image_token!r} {count} time(s) in its tokens and "
                f"{len(images)} image(s). Remove it from the text."
            )
        return expanded(sample, images, tokens)

    def _tokenized(self, texts: list[str], rows: Sequence[int], **options: bool) -> BatchEncoding:
        for row, text in zip(rows, texts, strict=True):
            try:
                text.isascii() or text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{self._source}: row {row} holds half a character ({text[error.start]!r}), which is not valid text. "
                    f"Repair the row, or the data.chat_template that made it."
                ) from None
        return self._tokenizer(texts, return_attention_mask=False, verbose=False, **options)

    def _fitting(self, samples: list[Sample]) -> list[Sample]:
        """Returns what of the samples of one document fits, and counts what became of it."""
        kept = [(sample, short) for sample in samples if (short := self._short(sample)) is not None]
        self.counts.dropped += not kept
        lost = 0 < len(kept) < len(samples)  # some of the answers, where each has a sample
        self.counts.truncated += lost or any(short is not sample for sample, short in kept)
        return [short for _, short in kept]

    def _short(self, sample: Sample) -> Sample | None:
        """Returns the sample if it fits, else what `data.overlong` says; None where nothing is left to learn from."""
        config, row, length = self._config, sample.document, len(sample.input_ids)
        if not any(sample.loss_mask):
            raise DataError(
                f"{self._source}: row {row} has no loss position: nothing in it is a response. "
                f"Remove the row, or set data.loss_on: all."
            )
        if length <= config.sequence_length:
            return sample
        if config.overlong == "error":
            of_images = sum(image.tokens for image in sample.images)
            if of_images:
                raise DataError(
                    f"{self._source}: row {row} has {length:,} tokens, {of_images:,} of them of {len(sample.images)} image(s), "
                    f"more than data.sequence_length = {config.sequence_length:,}. Raise it, let images have fewer with "
                    f"data.image_processor, or set data.overlong: drop or truncate."
                )
            raise DataError(
                f"{self._source}: row {row} has {length} tokens, more than data.sequence_length = "
                f"{config.sequence_length}. Set data.overlong: drop or truncate, or a larger data.sequence_length."
            )
        short = shortened_to(sample, config.sequence_length)
        return None if config.overlong == "drop" or not any(short.loss_mask) else short

    def _require_text(self, value: Any, row: int, column: str, key: str) -> None:
        if not isinstance(value, str):
            raise DataError(
                f"{self._source}: row {row} of column {column!r} holds {shown(value)} instead of text. "
                f"Fix the row, or set {key} to a column of text."
            )
