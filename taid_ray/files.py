"""JSON and JSON lines on disk: written so that a crash never leaves half a file, read with an error that names it."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from taid_ray.errors import CheckpointError

TAIL = 65_536  # bytes, far more than a line of metrics


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl or validation.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_lines(path: Path, last_only: bool = False) -> list[dict[str, Any]]:
    """JSON objects, one per line; nothing if there is no such file.

    What follows the last line break is being written, or was by a process that died. Raises CheckpointError if a line is
    damaged.
    """
    try:
        with path.open("rb") as file:
            if last_only:
                file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in (lines[-1:] if last_only else lines)]
    except ValueError as error:
        raise damaged(path, f"a line of it is not JSON ({error})") from None


def read_json(path: Path) -> Any:
    """None if there is no such file, or no longer: a run that ends before its first step takes its directory away.

    Raises CheckpointError if it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(path, f"it is not JSON ({error})") from None


def damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {found}; bring it back, or begin in another directory")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line; as `replace_text`."""
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """As `replace_text`."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes through a temporary file, so that nobody ever sees half of it, not even after a crash of the machine."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
