"""Values, names, seconds and amounts of data as text for tables, pages and the model card."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console


def shown_name(name: str) -> str:
    """A hub name as it is, or the last part of a local path."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


UNITS = ((86400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s")))


def shown_seconds(seconds: float) -> str:
    """Seconds as text, in at most two units: 42.0 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    large, small, names = next(unit for unit in UNITS if seconds >= unit[0])
    whole, rest = divmod(int(seconds), large)
    return f"{whole} {names[0]} {rest // small} {names[1]}"


def shown_bytes(size: float) -> str:
    """A number of bytes as text."""
    unit, name = next(
        (unit, name)
        for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (0, ""))
        if size >= unit
    )
    return f"{size / unit:,.1f} {name}" if unit else f"{size:,.0f} bytes"


def shown_amount(size: float, tokens: float) -> str:
    """An amount of data as text: bytes in all and per loss token."""
    return f"{shown_bytes(size)}, {size / max(tokens, 1):,.0f} bytes per loss token"


def shown(value: Any) -> str:
    """The short text of a searched key's value, for tables and axes."""
    text = full_text(value)
    return text if len(text) <= 24 else f"{text[:9]}...{text[-12:]}"  # paths differ at their ends


def full_text(value: Any) -> str:
    """The full text of a searched key's value: different values have different texts."""
    if isinstance(value, float):
        return (
            f"{value:.6g}" if len(repr(value)) <= 8 else f"{value:.4g}"
        )  # a value that somebody wrote keeps all its digits
    return value if isinstance(value, str) else json.dumps(value)


def print_line(console: Console, message: str) -> None:
    """Prints a message as it is: paths are neither broken over lines nor taken for markup, and nothing is coloured."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)
