"""Encoding of documents as samples: their tokens, and which of them carry loss. One block of documents at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from taid_ray.config.schema import DataConfig
from taid_ray.data import chat
from taid_ray.data.packing import Sample, cut
from taid_ray.errors import DataError

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


@dataclass(frozen=True)
class _Text:
    """One document as text."""

    text: str
    spans: Sequence[chat.Span]
    """Ranges of characters of its responses."""


class Encoder:
    """Turns documents into samples of at most `config.sequence_length` tokens, each with at least one loss position."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        """Prepares for one source of data, by whose key and name (`source`) every error begins.

        Raises DataError if the tokenizer cannot serve.
        """
        self.counts = Counts()
        self._config, self._tokenizer, self._source = config, tokenizer, source
        self._template = None if config.format == "text" else chat.chat_template(config.chat_template, tokenizer)
        if config.format == "chat" and self._template is None:
            raise DataError(
                f"data.format: chat needs a chat template and the tokenizer {tokenizer.name_or_path!r} has none. "
                f"Set data.chat_template to a Jinja template or to a file that holds one."
            )
        if config.format != "text" and not tokenizer.is_fast:
            raise DataError(
                f"data.format: {config.format} needs a fast tokenizer (tokenizer.json), to find the response among the "
                f"tokens; {tokenizer.name_or_path!r} has none. Convert the tokenizer, or use data.format: text."
            )

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
            self._as_text({name: values[i] for name, values in columns.items()}, first_row + i) for i in range(count)
        ]
        samples = [self._fitting(sample) for sample in self._tokenize(texts, first_row)]
        return [sample for sample in samples if sample is not None]

    def _encode_plain(self, texts: list[Any], first_row: int) -> list[Sample]:
        column = self._config.text_column
        for row, text in enumerate(texts, first_row):
            self._require_text(text, row, column, "data.text_column")
        eos = self._tokenizer.eos_token_id
        samples = []
        encoded = self._tokenized(texts, first_row)
        for row, tokens in enumerate(encoded["input_ids"], first_row):
            if eos is not None and tokens[-1:] != [eos]:  # some tokenizers append it themselves
                tokens.append(eos)
            pieces = cut(tokens, self._config.sequence_length, row)
            self.counts.dropped += not pieces
            samples.extend(pieces)
        return samples

    def _as_text(self, document: dict[str, Any], row: int) -> _Text:
        """Renders one chat or prompt/response document as text, and locates its responses."""
        if self._config.format == "chat":
            where = f"{self._source}: row {row} of column {self._config.messages_column!r}"
            messages = chat.read_messages(document[self._config.messages_column], where)
        else:
            prompt, response = self._prompt(document, row), document[self._config.response_column]
            self._require_text(response, row, self._config.response_column, "data.response_column")
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            if self._template is None:
                text = f"{prompt}\n{response}"
                return _Text(text, [(len(prompt) + 1, len(text))])
        assert self._template is not None
        return _Text(*chat.render(messages, self._template, self._tokenizer, f"{self._source}: row {row}"))

    def _prompt(self, document: dict[str, Any], row: int) -> str:
        parts = [(name, document[name]) for name in self._config.prompt_columns]
        for name, value in parts:
            if value is not None:  # an absent input is an empty one
                self._require_text(value, row, name, "data.prompt_columns")
        return "\n\n".join(value for _, value in parts if value)

    def _tokenize(self, texts: list[_Text], first_row: int) -> list[Sample]:
        """Tokenises each text once, as a whole; spans become loss masks through the tokens' character offsets.

        A template writes its special tokens itself. Without one the tokenizer adds its own and EOS ends the response.
        """
        encoded = self._tokenized(
            [text.text for text in texts],
            first_row,
            add_special_tokens=self._template is None,
            return_offsets_mapping=True,
        )
        samples = []
        found = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for row, (text, tokens, offsets) in enumerate(found, first_row):
            everything = self._config.loss_on == "all"
            mask = [True] * len(tokens) if everything else chat.inside(offsets, text.spans)
            if self._template is None and self._tokenizer.eos_token_id is not None:
                if tokens[-1:] == [self._tokenizer.eos_token_id]:
                    mask[-1] = True
                else:
                    tokens.append(self._tokenizer.eos_token_id)
                    mask.append(True)
            samples.append(Sample(tokens, [False, *mask[1:]], row))
        return samples

    def _tokenized(self, texts: list[str], first_row: int, **options: bool) -> BatchEncoding:
        for row, text in enumerate(texts, first_row):
            try:
                text.isascii() or text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{self._source}: row {row} holds half a character ({text[error.start]!r}), which is not valid text. "
                    f"Repair the row, or the data.chat_template that made it."
                ) from None
        return self._tokenizer(texts, return_attention_mask=False, verbose=False, **options)

    def _fitting(self, sample: Sample) -> Sample | None:
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
            raise DataError(
                f"{self._source}: row {row} has {length} tokens, more than data.sequence_length = "
                f"{config.sequence_length}. Set data.overlong: drop or truncate, or a larger data.sequence_length."
            )
        short = Sample(sample.input_ids[: config.sequence_length], sample.loss_mask[: config.sequence_length], row)
        if config.overlong == "drop" or not any(short.loss_mask):
            self.counts.dropped += 1
            return None
        self.counts.truncated += 1
        return short

    def _require_text(self, value: Any, row: int, column: str, key: str) -> None:
        if not isinstance(value, str):
            raise DataError(
                f"{self._source}: row {row} of column {column!r} holds {chat.shown(value)} instead of text. "
                f"Fix the row, or set {key} to a column of text."
            )
