"""Arrow files that are there whole or not at all: NAME.arrow, and NAME.json with its size and checksum, written last.

Damage is found in either: what a JSON says is followed by a hash of it.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from filelock import FileLock, Timeout

from taid_ray.data.reading.kinds import digest_of
from taid_ray.errors import RunError
from taid_ray.files import read_json, write_json


@contextmanager
def making(path: Path, wait: bool) -> Iterator[bool]:
    """Holds the right to write a file, which ends with the process; yields whether it was granted.

    wait: until whoever holds it is done; else the answer is False. The block is to make the file, unless it is there by now.
    """
    lock = path.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=-1 if wait else 0):
            yield True
            # Not after an error, when one process may wait for this file while another one makes a new one.
            lock.unlink(missing_ok=True)
    except Timeout:
        yield False


def write_sealed(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], facts: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Writes record batches as an Arrow file, and beside it, as JSON, what `facts` says. To be called inside `making`.

    facts: is called with the whole file, under a temporary name, when all batches were taken. Returns what it says, with the
    size and the checksum of the file. Raises RunError if the disk does not take it. What a killed process leaves is
    overwritten by the next one.
    """
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        return seal(path, facts(temporary))
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """Returns the name of a file while it is made."""
    return path.with_name(f"{path.name}.tmp")


def seal(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Puts a file that is whole under its temporary name into its place, and writes what is known of it beside it.

    Returns `facts`, with the size and the checksum of the file. Raises OSError or RunError if the disk does not take it.
    """
    temporary = temporary_of(path)
    said = facts | {"size": temporary.stat().st_size, "checksum": digest_of(temporary)}
    temporary.replace(path)
    write_json(path.with_suffix(".json"), said | {"seal": _seal(said)})
    return said


def unwritten(path: Path, error: OSError) -> RunError:
    """Makes the error for a file that the disk does not take."""
    return RunError(f"{path} cannot be written ({error}); make room there, and start again")


def sealed_facts(path: Path) -> dict[str, Any] | None:
    """Returns what `write_sealed` returned if the file is there and has its size, else None. Does not read it."""
    try:
        said = dict(read_json(path.with_suffix(".json")) or {})
        fine = said.pop("seal", None) == _seal(said) and path.stat().st_size == said["size"]
    except (RunError, FileNotFoundError, LookupError, TypeError, ValueError):
        return None
    return said if fine else None


def read_sealed(path: Path, notify: Callable[[str], None]) -> dict[str, Any] | None:
    """Returns what `write_sealed` returned if the file is whole, else None. Reads all of it, for its checksum.

    notify: is told if the file is there and damaged. Raises OSError if it cannot be read.
    """
    said = sealed_facts(path)
    if said is not None and digest_of(path) == said["checksum"]:
        return said
    if path.with_suffix(".json").exists():
        notify(f"{path} is damaged")
    return None


def _seal(said: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode()).hexdigest()
