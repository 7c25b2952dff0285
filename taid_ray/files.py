"""JSON and JSON lines on disk: a crash never leaves half a file, and an error names the file that is damaged."""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from taid_ray.errors import RunError

TAIL = 65_536  # bytes, far more than the lines that are asked for at a time


def read_lines(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file that holds one per line, or its `last` ones, if these are TAIL bytes at most.

    Nothing if there is no such file. What follows the last line break is left out: it is being written, or was by a process
    that died. Raises RunError if a line is damaged.
    """
    try:
        with path.open("rb") as file:
            skipped = max(0, path.stat().st_size - TAIL) if last else 0
            file.seek(skipped)
            lines = file.read().split(b"\n")[1 if skipped else 0 : -1]
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in lines[-(last or 0) :]]
    except ValueError as error:
        raise damaged(path, f"a line of it is not JSON ({error})") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is no such file.

    There may be none any more: a run that ends before its first step removes its directory. Raises RunError if it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(path, f"it is not JSON ({error})") from None


def damaged(path: Path, found: str) -> RunError:
    """The error for a file whose content is not what was written there."""
    return RunError(f"{path} is damaged: {found}; restore it, or start again in another directory")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line, as `replace_text` writes."""
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Writes JSON, as `replace_text` writes."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file through a temporary one, so that nobody ever sees half of it, not even after a crash of the machine.

    Raises RunError if it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error}); make room there, and give the same command again"
        ) from error


def give_usual_mode(path: Path) -> None:
    """Gives a file the permissions that the umask, or the directory's default ACL, gives a new one.

    For files that a library makes readable by their owner alone.
    """
    usual = path.with_name(f"{path.name}.mode")
    usual.touch()
    shutil.copymode(usual, path)
    usual.unlink()


def _sync_directory(directory: Path) -> None:
    """Makes a rename in it survive a crash of the machine, where the file system knows how to."""
    number = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)
