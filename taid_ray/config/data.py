"""The section `data`: the documents, and how they become rows of tokens."""

import datetime
from collections import Counter
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from taid_ray.config.fields import (
    MOVABLE,
    RESUMABLE,
    SETS_RATES,
    TRAINING_ONLY,
    Int,
    Name,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    SharedByTrials,
)

Format = Literal["text", "chat", "prompt_response"]


class SourceConfig(Section):
    """One of several sources of training data; its path alone stands for a source with nothing else. A key that is null here has
    the value that the section `data` gives it."""

    path: Annotated[Name, MOVABLE]
    """The source's documents, given like `data.train` where there is only one source."""
    name: Name | None = None
    """Name of the source in metrics and reports. Default: the last part of `path`, without its ending."""
    weight: Positive | None = None
    """Share of this source in the rows of an epoch, relative to the other sources' weights. Give all sources a weight, or none.
    The sources with a weight have as many rows in an epoch together as they have in all."""
    rows: PositiveInt | None = None
    """Number of rows of this source in an epoch, instead of a weight; may be more than it has. Without either, an epoch has all
    rows of the source."""
    valid: Annotated[Name | None, MOVABLE] = None
    """Validation data of this source, given like `path`. Without it, and without `data.valid`, the first `valid_documents`
    documents of the source are kept for validation."""
    subset: str | None = None
    """As `data.subset`."""
    split: str | None = None
    """As `data.split`."""
    valid_split: str | None = None
    """As `data.valid_split`."""
    valid_documents: PositiveInt | None = None
    """As `data.valid_documents`."""
    format: Annotated[Format | None, SETS_RATES] = None
    """As `data.format`."""
    text_column: str | None = None
    """As `data.text_column`."""
    messages_column: str | None = None
    """As `data.messages_column`."""
    prompt_columns: Annotated[list[str] | None, Field(min_length=1)] = None
    """As `data.prompt_columns`."""
    response_column: str | None = None
    """As `data.response_column`."""
    images_column: Annotated[Name | None, SETS_RATES] = None
    """As `data.images_column`."""
    images_directory: Annotated[Name | None, MOVABLE] = None
    """As `data.images_directory`."""
    bad_images: Literal["error", "drop"] | None = None
    """As `data.bad_images`."""
    chat_template: str | None = None
    """As `data.chat_template`. Of several, RUN/model gets that of the first source that has one."""
    loss_on: Annotated[Literal["response", "all"] | None, SETS_RATES] = None
    """As `data.loss_on`."""
    turns: Annotated[Literal["all", "last"] | None, SETS_RATES] = None
    """As `data.turns`."""
    overlong: Annotated[Literal["error", "drop", "truncate"] | None, SETS_RATES] = None
    """As `data.overlong`."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @property
    def label(self) -> str:
        """The source's name, or what stands for it."""
        return self.name or PurePath(self.path).name.partition(".")[0] or self.path


class DataConfig(Section):
    """The documents to train and to validate on, and how they become rows of tokens."""

    train: Annotated[
        Annotated[Name, Tag("[name]")] | Annotated[list[SourceConfig], Tag("[sources]"), Field(min_length=1)],
        Discriminator(lambda value: "[sources]" if isinstance(value, list) else "[name]"),
        MOVABLE,
        TRAINING_ONLY,
    ]
    """Training data: the name of a dataset on the Hugging Face hub, a local file (jsonl, json, parquet, csv, tsv, txt or arrow;
    text also compressed as gz, zst or bz2), a directory of such files, a pattern for them such as `corpus/**/part-*.parquet`, or
    what `save_to_disk` of the library datasets wrote. For a mixture: a list of sources, with the keys below."""
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
    format: Annotated[Format, SETS_RATES] = "text"
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
    images_column: Annotated[Name | None, SETS_RATES] = None
    """With `format: chat`: the column of each row's images: paths, bytes, mappings of both, or lists of these. Rows without any
    are text. Where it is `images`, `image` is looked for, too. `<image>` in a message, or a part of the type `image`, says
    where an image stands; without any of these, images begin the first message of the user."""
    images_directory: Annotated[Name | None, MOVABLE] = None
    """Folder or zip archive that the paths of images are relative to. All nodes must see it."""
    bad_images: Literal["error", "drop"] = "error"
    """What happens to a row with an image that is missing, damaged, too large, or not a still picture of 8 bits a colour: the run
    stops with an error, or the row is left out and counted. To drop rows, all images are decoded once."""
    max_image_pixels: Annotated[Int, Field(ge=1, le=89_478_485)] = 67_108_864
    """Largest number of pixels of an image; one with more counts as damaged."""
    image_processor: Annotated[dict[str, Any], SETS_RATES] = {}
    """Settings of the models' image processors in place of their own, such as `max_patches` (InternVL) or `max_pixels` (Qwen-VL):
    they decide how many tokens an image becomes."""
    sees_at_least: Annotated[NonNegative, RESUMABLE] = 0.01
    """How far grey images in place of the real ones must change what the teacher predicts, in nats (median of the first 32
    validation rows with images). A teacher below it does not see, and is refused; of a student it is noted."""
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

    @model_validator(mode="after")
    def _images_fit(self) -> "DataConfig":
        sources = [] if isinstance(self.train, str) else self.train
        for key, column, form in (
            ("data.images_column", self.images_column, self.format),
            *(
                (f"data.train[{number}].images_column", source.images_column, source.format or self.format)
                for number, source in enumerate(sources)
            ),
        ):
            if column is None:
                continue
            if form != "chat":
                raise ValueError(f"{key} needs format: chat (found format: {form})")
            if self.order != "global":
                raise ValueError(f"{key} needs data.order: global (found data.order: {self.order})")
        return self

    @model_validator(mode="after")
    def _sources_fit(self) -> "DataConfig":
        if isinstance(self.train, str):
            return self
        if self.order == "blocks":
            raise ValueError(
                f"data.train: several sources are mixed in the global order only (found data.order: blocks"
                f"{', of data.streaming' if self.streaming else ''}); remove it, or name one source"
            )
        weights = [number for number, source in enumerate(self.train) if source.weight is not None]
        for number, source in enumerate(self.train):
            key = f"data.train[{number}]"
            if source.weight is not None and source.rows is not None:
                raise ValueError(f"{key}: give weight or rows, not both (found {source.weight:g} and {source.rows})")
            if weights and source.weight is None and source.rows is None:
                raise ValueError(
                    f"{key}: has neither weight nor rows, but data.train[{weights[0]}] has a weight; give one of the two"
                )
            turns, loss_on = source.turns or self.turns, source.loss_on or self.loss_on
            if (turns, loss_on) == ("last", "all"):
                raise ValueError(f"{key}: turns: last goes with loss_on: response (found loss_on: all)")
            if source.valid is not None and self.valid is not None:
                raise ValueError(
                    f"{key}.valid is {source.valid!r}, but data.valid ({self.valid!r}) is for all sources; remove one of them"
                )
        label, times = Counter(source.label for source in self.train).most_common(1)[0]
        if times > 1:
            raise ValueError(
                f"data.train: {times} sources are called {label!r}; give each a name of its own (key name)"
            )
        return self

    @property
    def sources(self) -> tuple["DataSource", ...]:
        """The sources of the training data, each with all keys as they hold for it. Where `train` is a name there is one."""
        own = self.model_dump(exclude={"train"})
        if isinstance(self.train, str):
            return (DataSource(**own, train=self.train),)
        found = []
        for number, source in enumerate(self.train):
            given = source.model_dump(exclude={"path", "name", "weight", "rows"}, exclude_none=True)
            valid_key = f"data.train[{number}].valid" if source.valid is not None else "data.valid"
            keys = {"key": f"data.train[{number}].path", "valid_key": valid_key}
            found.append(DataSource(**own | given | keys, train=source.path, label=source.label))
        return tuple(found)

    @property
    def has_images(self) -> bool:
        """Tells whether a source of training data has a column of images, which makes a run one of vision-language models."""
        return any(source.images_column is not None for source in self.sources)

    @property
    def validations(self) -> tuple["DataSource", ...]:
        """The sources of the validation rows: those of the training data, unless `valid` is for all of them."""
        if self.valid is None or isinstance(self.train, str):
            return self.sources
        return (DataSource(**self.model_dump(exclude={"train"}), train=self.train[0].path),)

    @property
    def names(self) -> list[str]:
        """The paths or names of all training and validation data."""
        found = [(source.train, source.valid) for source in self.sources]
        return [name for pair in found for name in pair if name is not None]


class DataSource(DataConfig):
    """The section `data` as it holds for one source of training data, with the validation data that belong to it."""

    train: Name
    """The source's documents."""
    label: str = ""
    """Name of the source in metrics and reports; empty where there is only one."""
    key: str = "data.train"
    """Key that the documents were given under, for messages."""
    valid_key: str = "data.valid"
    """Key that the validation data were given under, for messages."""
