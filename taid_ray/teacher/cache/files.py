"""Files of the cache: writing one sample's tensors as bytes, checking them, and listing and removing files."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from taid_ray.teacher.wire import digest, pack

ABANDONED_S = 600.0
"""Age at which a file that is still being written has lost its writer."""
BLOCK = 4096
"""Bytes of a file system's block."""
SUFFIX = ".safetensors"


class Entry(NamedTuple):
    """A file of the cache. Sorted, those that were not used for longest come first."""

    used: float
    """When it was read or written last, in seconds since 1970."""
    bytes: int
    """Its size on the disk."""
    path: str


def seal(key: str, tensors: dict[str, Tensor]) -> bytes:
    """Content of the file that holds a sample's tensors, with its key and a checksum."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checksum = digest({name: pack(tensor) for name, tensor in whole.items()})
    return save(whole, {"key": key, "digest": checksum})


def unseal(content: bytes, key: str) -> dict[str, Tensor] | None:
    """The tensors that were sealed under this key, or None for anything else."""
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        fine = header["key"] == key and header["digest"] == digest({name: pack(x) for name, x in tensors.items()})
    except (SafetensorError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError):
        return None
    return tensors if fine else None


def list_files(directory: str) -> Iterator[Entry]:
    """The files in one directory; none if it does not exist."""
    with suppress(FileNotFoundError), os.scandir(directory) as files:
        for file in files:
            with suppress(FileNotFoundError):  # moved or removed meanwhile
                status = file.stat(follow_symlinks=False)
                yield Entry(status.st_mtime, on_disk(status.st_size), file.path)


def is_abandoned(entry: Entry) -> bool:
    """Tells whether a file is what a killed writer left, and removes it then."""
    if entry.path.endswith(SUFFIX) or time.time() - entry.used < ABANDONED_S:
        return False
    Path(entry.path).unlink(missing_ok=True)
    return True


def remove_oldest(entries: list[Entry], max_bytes: int) -> list[Entry]:
    """Removes files until at most max_bytes are left, and returns them. What is being written is left alone."""
    left, removed = total_bytes(entries), []
    for entry in sorted(entry for entry in entries if entry.path.endswith(SUFFIX)):
        if left <= max_bytes:
            break
        Path(entry.path).unlink(missing_ok=True)
        left -= entry.bytes
        removed.append(entry)
    return removed


def total_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of all of them on the disk."""
    return sum(entry.bytes for entry in entries)


def on_disk(size: int) -> int:
    """Bytes that a file of this size takes: whole blocks."""
    return -(-size // BLOCK) * BLOCK
