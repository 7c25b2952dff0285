"""Distributions that a search draws a configuration key's values from, checked as they are read."""

import math
import random
import re
from reprlib import repr as shown
from typing import Any, Literal

from pydantic import model_serializer, model_validator

from taid_ray.config.fields import Section

ARGUMENTS = {
    "uniform": "[lower, upper]",
    "loguniform": "[lower, upper]",
    "quniform": "[lower, upper, q]",
    "qloguniform": "[lower, upper, q]",
    "randint": "[lower, upper], upper itself excluded",
    "lograndint": "[lower, upper], upper itself excluded",
}
"""Arguments of every distribution but `choice`; the names are Ray Tune's."""


class Distribution(Section):
    """Distribution of one key's values, written as `{kind: arguments}`, for example `{loguniform: [1, 20]}`."""

    kind: Literal["uniform", "loguniform", "quniform", "qloguniform", "randint", "lograndint", "choice"]
    """Name of the distribution, as Ray Tune has it."""
    arguments: list[Any]
    """Numbers as in ARGUMENTS; with `choice` the values to choose from."""

    @model_validator(mode="before")
    @classmethod
    def _from_mapping(cls, value: Any) -> Any:
        kinds = ", ".join([*ARGUMENTS, "choice"])
        if not isinstance(value, dict) or len(value) != 1:
            found = f" (found {shown(value)})" if isinstance(value, dict) else ""  # text.explain shows others
            raise ValueError(f"must be one distribution, such as {{uniform: [0, 1]}}, of {kinds}{found}")
        ((kind, arguments),) = value.items()
        if kind != "choice" and kind not in ARGUMENTS:
            raise ValueError(f"there is no distribution {shown(kind)}; use one of {kinds}")
        if not isinstance(arguments, list):
            raise ValueError(f"{kind} takes {ARGUMENTS.get(kind, 'a list of values')} (found {shown(arguments)})")
        arguments = [_number(argument) for argument in arguments]
        if kind == "choice":
            _check_choice(arguments)
        else:
            arguments = _checked_range(kind, arguments)
        return {"kind": kind, "arguments": arguments}

    @model_serializer
    def _as_mapping(self) -> dict[str, list[Any]]:
        return {self.kind: self.arguments}

    @property
    def ends(self) -> list[Any]:
        """The smallest and largest value that can be drawn (the upper end of a float range is only approached), or
        every choice."""
        if self.kind == "choice":
            return self.arguments
        lower, upper = self.arguments[:2]
        return [lower, upper - 1 if "int" in self.kind else upper]

    def draw(self, random_numbers: random.Random) -> Any:
        """Draws one value, distributed as by Ray Tune's function of that name."""
        if self.kind == "choice":
            return random_numbers.choice(self.arguments)
        lower, upper, *q = self.arguments
        if "log" in self.kind:
            value = math.exp(random_numbers.uniform(math.log(lower), math.log(upper)))
        else:
            value = random_numbers.uniform(lower, upper)
        if "int" in self.kind:
            return min(int(value), upper - 1)
        return round(value / q[0]) * q[0] if q else min(max(value, lower), upper)


def _number(value: Any) -> Any:
    """Turns text such as 1e-4, which YAML 1.1 does not read as a number without a dot, into the number it means."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    scientific = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if scientific else value


def _check_choice(values: list[Any]) -> None:
    if not values:
        raise ValueError("choice has no values; list at least one")
    seen: set[str] = set()
    for value in values:
        if repr(value) in seen:
            raise ValueError(f"choice names {shown(value)} twice; remove one")
        seen.add(repr(value))


def _checked_range(kind: str, arguments: list[Any]) -> list[Any]:
    """Returns the numbers of a range; those of an integer range as integers. Raises ValueError."""
    found = f"(found {kind}: {shown(arguments)})"
    numbers = all(isinstance(a, int | float) and not isinstance(a, bool) and math.isfinite(a) for a in arguments)
    if not numbers or len(arguments) != (3 if kind.startswith("q") else 2):
        raise ValueError(f"{kind} takes {ARGUMENTS[kind]} {found}")
    lower, upper, *q = arguments
    if lower >= upper:
        raise ValueError(f"the range is empty: its lower end must be below its upper end {found}")
    if "log" in kind and lower <= 0:
        raise ValueError(f"a logarithmic range must begin above 0 {found}")
    if q and q[0] <= 0:
        raise ValueError(f"the step q must be above 0 {found}")
    if q and any(not math.isclose(end / q[0], round(end / q[0])) for end in (lower, upper)):
        raise ValueError(f"both ends must be multiples of the step q {found}")
    if "int" in kind and any(number != int(number) for number in arguments):
        raise ValueError(f"{kind} takes whole numbers {found}")
    return [int(number) for number in arguments] if "int" in kind else arguments
