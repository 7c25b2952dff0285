"""The section `data`: the documents, and how they become rows of tokens."""

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from taid_ray.config.fields import (
    MOVABLE,
    RESUMABLE,
    SETS_RATES,
    TRAINING_ONLY,
    Int,
    Name,
    PositiveInt,
    Section,
    SharedByTrials,
)


class DataConfig(Section):
    """The documents to train and to validate on, and how they become rows of tokens."""

    train: Annotated[Name, MOVABLE, TRAINING_ONLY]
    """Training data: the name of a dataset on the Hugging Face hub, a local file (jsonl, json, parquet, csv, tsv, txt or arrow;
    text also compressed as gz, zst or bz2), a directory of such files, a pattern for them such as `corpus/**/part-*.parquet`, or
    what `save_to_disk` of the library datasets wrote."""
    valid: Annotated[Name | None, MOVABLE] = None
    """Validation data, given like `train`. Without it the first `valid_documents` documents of `train` are kept for
    validation, and not trained on."""
    subset: str | None = None
    """Configuration name of a dataset on the hub, or of a local clone of one, where it has several."""
    split: Annotated[str, TRAINING_ONLY] = "train"
    """Split of `train` to read, if it has several. In a local directory the names of files and folders tell their split."""
    valid_split: str = "validation"
    """Split of `valid` to read, if it has several."""
    valid_documents: PositiveInt = 200
    """Largest number of documents that validation uses."""
    format: Annotated[Literal["text", "chat", "prompt_response"], SETS_RATES] = "text"
    """What a row of the data holds. `text`: a document. `chat`: a list of messages. `prompt_response`: a prompt and a
    response, in columns of their own."""
    text_column: str = "text"
    """With `format: text`: the column of the documents."""
    messages_column: str = "messages"
    """With `format: chat`: the column of the message lists. Each message has a `role` and a `content`, or a `from` and a
    `value`. Where it is left at the default, `conversations` and `conversation` are looked for, too. A column `tools` holds the
    tools of each row, if there is one."""
    prompt_columns: Annotated[list[str], Field(min_length=1)] = ["prompt"]
    """With `format: prompt_response`: the columns that make the prompt, joined by a blank line. Empty ones are left out."""
    response_column: str = "response"
    """With `format: prompt_response`: the column of the response. Where it is left at the default, `completion` is looked for,
    too."""
    chat_template: str | None = None
    """Jinja chat template, or the path of a file that holds one, for `format: chat` and `prompt_response`. By default the
    tokenizer's own."""
    loss_on: Annotated[Literal["response", "all"], SETS_RATES] = "response"
    """Which tokens carry loss with `format: chat` and `prompt_response`: those of the responses only, or all, as the published
    TAID code does. With `format: text` all tokens carry loss."""
    turns: Annotated[Literal["all", "last"], SETS_RATES] = "all"
    """Which answers of a conversation carry loss with `format: chat` and `loss_on: response`: all, or the last one only. Where
    the template renders earlier answers differently once more follows (without their reasoning, for example), every answer
    is trained in the form in which it is generated, in a sample that ends with it."""
    date: str | None = None
    """The day that a chat template is told if it asks for today's, for example "2026-11-29" (in quotes). Default: the day
    on which the run began."""
    sequence_length: Annotated[Int, Field(ge=2), SETS_RATES] = 2048
    """Largest number of tokens in a row."""
    pack: Annotated[bool, SETS_RATES] = True
    """Put several documents into one row. They do not attend to one another."""
    overlong: Annotated[Literal["error", "drop", "truncate"], SETS_RATES] = "error"
    """What happens to a document that is longer than `sequence_length`, with `format: chat` and `prompt_response`: the run stops
    with an error, the document is left out, or its end is cut off. With `format: text` it is cut into pieces."""
    streaming: bool = False
    """Read the data as a stream, which may have no end: nothing is counted or encoded before the first step, and a dataset on
    the hub is not prepared on disk. Needs `train.steps`, and shuffles in blocks only (`order: blocks`)."""
    order: Annotated[Literal["global", "blocks"], TRAINING_ONLY] = "global"
    """Order of the training rows. `global`: all documents are encoded once, into the store, and every epoch is a permutation of
    all rows. `blocks`: every worker reads and encodes the documents itself, and they are shuffled within blocks of
    `block_documents` only, so that data sorted by source stay sorted; the default with `streaming`."""
    store: Annotated[Name | None, RESUMABLE, TRAINING_ONLY, SharedByTrials("all trials share the encoded data")] = None
    """With `order: global`: directory of the encoded data, which all nodes must see, or a URI such as s3://bucket/path, whose
    files are copied to each node. Runs and searches on the same data share it. Default: `encoded-data` beside the run
    directory."""
    block_documents: Annotated[PositiveInt, TRAINING_ONLY] = 1024
    """With `order: blocks`: documents are read, shuffled and packed in blocks of this many. Larger blocks shuffle better and need
    more memory."""

    @model_validator(mode="before")
    @classmethod
    def _order_of_stream(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("streaming") is True and "order" not in values:
            return {**values, "order": "blocks"}
        return values

    @field_validator("date")
    @classmethod
    def _day(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                return datetime.date.fromisoformat(value).isoformat()
            except ValueError:
                raise ValueError('must be a day such as "2026-11-29"') from None
        return value

    @model_validator(mode="after")
    def _turns_fit(self) -> "DataConfig":
        if self.turns == "last" and self.loss_on == "all":
            raise ValueError("data.turns: last goes with data.loss_on: response (found data.loss_on: all)")
        if self.streaming and self.order == "global":
            raise ValueError(
                "data.order: global needs data with an end; remove it, or data.streaming: true (order: blocks)"
            )
        return self
