"""One tier of the cache: a directory of small safetensors files that any number of processes and nodes use at once.

    ROOT/KE/KEY.safetensors    one sample's part of the teacher's answer, under the first two characters of its key
    ROOT/new/RANDOM            files being written; renamed when whole
    ROOT/lock                  held (flock) by whoever counts and makes room; it ends with its holder

No file is ever changed, so whoever finds one finds all of it, unless the machine failed; a checksum tells. What was used
last is what was read or written last, by the time of change that each file has anyway.
"""

import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from taid_ray.errors import TeacherError
from taid_ray.teacher.wire import digest, pack

WRITERS = 64
"""Processes that may write at the same time without exceeding the limit together."""
FULL, MADE_ROOM = 0.9, 0.8
"""Parts of the limit: where room is made, and down to where."""
TOUCH_S = 60.0
"""A file's time of use is this precise, so that a file read often is not written often."""
ABANDONED_S = 600.0
"""A file that is being written for so long has lost its writer."""
BLOCK = 4096
SUFFIX = ".safetensors"


class Entry(NamedTuple):
    """A file in the store."""

    used: float
    """When, in seconds since 1970."""
    bytes: int
    """On the disk."""
    path: str


class CacheStore:
    """Samples by their key. Thread-safe.

    Nothing about it is an error: what cannot be read is not there, what cannot be written will not be there later.
    """

    def __init__(self, root: Path, limit_bytes: int, notify: Callable[[str], None]):
        """limit_bytes: that all files together never exceed. notify: is told, once, why the store does not work."""
        self._root, self._limit, self._notify = root, limit_bytes, notify
        # Each writer looks again after so many bytes. So WRITERS of them that saw it almost full exceed nothing.
        self._allowance = int((1 - FULL) * limit_bytes / WRITERS)
        self._may_write = 0
        self._writing = threading.Lock()
        self._said = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a sample, or None if they are not there, or not what was written (then they are removed)."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                age_s = time.time() - os.fstat(file.fileno()).st_mtime
                content = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(f"cannot be read ({error})")
            return None
        tensors = _unsealed(content, key)
        with suppress(OSError):  # another user's, or gone meanwhile
            if tensors is None:
                path.unlink()
            elif age_s > TOUCH_S:
                os.utime(path)
        return tensors

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keeps the tensors of a sample, if there is room for them."""
        content = _sealed(key, tensors)
        size = _on_disk(len(content))
        with self._writing:
            try:
                if size <= self._may_write:
                    self._may_write -= size
                    self._write(key, content)
                    return
                with self._locked():
                    if self._make_room(size):
                        self._write(key, content)
                        self._may_write = self._allowance
            except OSError as error:
                self._say(f"cannot keep more ({error})")

    def entries(self) -> list[Entry]:
        """All files, half written ones too. Raises OSError."""
        found: list[Entry] = []
        with suppress(FileNotFoundError), os.scandir(self._root) as directories:
            for directory in directories:
                if directory.is_dir():
                    found.extend(_files(directory.path))
        return found

    def prune(self, max_bytes: int) -> int:
        """Removes what was not used for longest until at most `max_bytes` are left, and returns how many were removed."""
        if not self._root.is_dir():
            return 0
        with self._writing, self._locked():
            return len(_remove_oldest(self.entries(), max_bytes))

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / f"{key}{SUFFIX}"

    def _make_room(self, size: int) -> bool:
        """Whether there is room for a file of `size` bytes now. To be called while the lock is held."""
        if size > MADE_ROOM * self._limit:
            self._say(f"is too small for a sample of {size / 2**20:.1f} MiB")
            return False
        entries = [entry for entry in self.entries() if not _is_abandoned(entry)]
        left = sum(entry.bytes for entry in entries)
        if left + size > FULL * self._limit:
            left -= sum(entry.bytes for entry in _remove_oldest(entries, int(MADE_ROOM * self._limit) - size))
        return left + size <= FULL * self._limit

    def _write(self, key: str, content: bytes) -> None:
        path, temporary = self._path(key), self._root / "new" / uuid.uuid4().hex
        for directory in (path.parent, temporary.parent):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            self._notify(f"the cache of teacher outputs in {self._root} {what}; the run goes on without that part")


def _sealed(key: str, tensors: dict[str, Tensor]) -> bytes:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checksum = digest({name: pack(tensor) for name, tensor in whole.items()})
    return save(whole, {"key": key, "digest": checksum})


def _unsealed(content: bytes, key: str) -> dict[str, Tensor] | None:
    """What was sealed under this key, or None for anything else."""
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        fine = header["key"] == key and header["digest"] == digest({name: pack(x) for name, x in tensors.items()})
    except (SafetensorError, TeacherError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError):
        return None
    return tensors if fine else None


def _files(directory: str) -> Iterator[Entry]:
    with suppress(FileNotFoundError), os.scandir(directory) as files:
        for file in files:
            with suppress(FileNotFoundError):  # moved or removed meanwhile
                found = file.stat(follow_symlinks=False)
                yield Entry(found.st_mtime, _on_disk(found.st_size), file.path)


def _is_abandoned(entry: Entry) -> bool:
    """Whether it is what a killed writer left; removes it then."""
    if entry.path.endswith(SUFFIX) or time.time() - entry.used < ABANDONED_S:
        return False
    Path(entry.path).unlink(missing_ok=True)
    return True


def _remove_oldest(entries: list[Entry], max_bytes: int) -> list[Entry]:
    """Until at most max_bytes are left; returns what was removed. What is being written is left alone."""
    total, removed = sum(entry.bytes for entry in entries), []
    for entry in sorted(entry for entry in entries if entry.path.endswith(SUFFIX)):
        if total <= max_bytes:
            break
        Path(entry.path).unlink(missing_ok=True)
        total -= entry.bytes
        removed.append(entry)
    return removed


def _on_disk(size: int) -> int:
    """Whole blocks, as file systems keep files."""
    return -(-size // BLOCK) * BLOCK
