"""The building blocks of the configuration: types of values, sections and ranges, and what a field says beside its type.

A field says more about its key by a mark: `workers: Annotated[Range, RESUMABLE]`. A mark on a section holds for all of its
keys. A field without marks has the defaults: a resumed run must keep its value, and a search may vary it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)

from taid_ray.config.text import CREDENTIALS


@dataclass(frozen=True)
class Mark:
    """Property of a configuration key, written at its field."""

    meaning: str
    """The property in words."""


@dataclass(frozen=True)
class SharedByTrials(Mark):
    """Mark of a key whose value all trials of a search have in common, so that it cannot be searched; `meaning` says why."""


RESUMABLE = Mark("A run may be resumed with another value: it changes where or how the run is computed, not what.")
MOVABLE = Mark(
    "A run may be resumed with another path to the same data: their contents are compared with the checkpoint's."
)
SETS_STEPS = Mark("Sets the number of optimizer steps.")
SETS_ROWS = Mark("Changes the number of rows or batches in the data, and so the number of steps of `train.epochs`.")
SETS_RATES = Mark("Decides how long so many rows take, so that `taid-ray plan --from` needs a run with the same value.")
EVALUATED = Mark("`taid-ray eval` uses the key.")
TRAINING_ONLY = Mark("`taid-ray eval` does not use the key, although it uses its section.")


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take `yes` and `on`, which YAML reads as true, for 1
        raise ValueError("must be a number")
    return value


def _name(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    address = value.partition("://")[2]
    if re.match(r"[^@]*:[^@]*@", address) or re.search(r"[?&][^=]*(secret|token|key|password)[^=]*=", address, re.I):
        raise ValueError(
            f"{CREDENTIALS}, because config.yaml is copied and shown; give them to the storage's library by its "
            "environment variables or its own files"
        )
    return value


def home_checked(path: str | None) -> str | None:
    """Returns the path itself. Raises ValueError if it begins with a `~` that stands for no home directory."""
    try:
        Path(path or "").expanduser()
    except RuntimeError:
        raise ValueError("there is no such home directory; write the path without '~'") from None
    return path


Name = Annotated[str, AfterValidator(_name)]
Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
PositiveInt = Annotated[Int, Field(ge=1)]
Count = Annotated[Int, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Unit = Annotated[Float, Field(ge=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of configuration keys: frozen, and without unknown keys. The text below a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Range(Section):
    """The smallest and the largest allowed number of something. A whole number stands for a range of that number only."""

    min: PositiveInt
    """Smallest number."""
    max: PositiveInt
    """Largest number."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        if isinstance(value, dict | Range):
            return value
        if isinstance(value, list) and len(value) == 2:
            return {"min": value[0], "max": value[1]}
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError("must be a whole number of at least 1, or {min: A, max: B}")
        return {"min": value, "max": value}

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}; lower min")
        return self

    @model_serializer
    def _as_number(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}

    @property
    def fixed(self) -> bool:
        """True if the range holds one number only."""
        return self.min == self.max
