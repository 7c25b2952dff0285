"""The columns that each `data.format` reads: under which names they are looked for, and which key sets the name."""

from collections.abc import Container
from dataclasses import dataclass, replace

from taid_ray.config.data import DataConfig

USUAL_NAMES = {
    "data.messages_column": ("messages", "conversations", "conversation"),
    "data.response_column": ("response", "completion"),
    "data.images_column": ("images", "image"),
}
"""The default of a key, and the other names under which public data sets keep such a column."""


@dataclass(frozen=True)
class Column:
    """One column of the data."""

    names: tuple[str, ...]
    """Acceptable names, the preferred one first. Documents are handed over with this column under the first one."""
    key: str
    """The YAML key that names the column; for an optional one, which has no key of its own, the format's."""
    required: bool = True
    """False: data without it are complete."""

    @property
    def name(self) -> str:
        """The name under which it is handed over."""
        return self.names[0]


def columns_of(config: DataConfig) -> list[Column]:
    """Lists the columns that `config.format` reads."""
    match config.format:
        case "text":
            return [_column(config.text_column, "data.text_column")]
        case "chat":
            found = [
                _column(config.messages_column, "data.messages_column"),
                Column(("tools",), "data.format", required=False),
                Column(("system",), "data.format", required=False),
            ]
            if config.images_column is not None:
                found.append(replace(_column(config.images_column, "data.images_column"), required=False))
            return found
        case "prompt_response":
            return [
                *(_column(name, "data.prompt_columns") for name in dict.fromkeys(config.prompt_columns)),
                _column(config.response_column, "data.response_column"),
            ]


def lacking(columns: list[Column], found: Container[str]) -> list[Column]:
    """Lists the required columns that a file lacks. Of those of one key, which are the prompt's, one is enough.

    columns: those of the format. found: the preferred names of the ones that the file has.
    """
    keys = {column.key for column in columns if column.name in found}
    return [column for column in columns if column.required and column.key not in keys]


def _column(name: str, key: str) -> Column:
    """A required column; other usual names are acceptable only where the configured one is the default."""
    usual = USUAL_NAMES.get(key, (name,))
    return Column(usual if name == usual[0] else (name,), key)
