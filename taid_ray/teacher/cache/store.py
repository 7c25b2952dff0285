"""The cache on disk: a directory of small safetensors files that any number of processes and nodes use at once.

    DIRECTORY/id                              name of this cache, which all who see the directory have in common
    DIRECTORY/samples/KE/KEY.safetensors      one sample's part of the teacher's answer, under the first two characters of its key
    DIRECTORY/samples/new/RANDOM              files being written; renamed when whole
    DIRECTORY/samples/used                    bytes that are in use or may be written without asking again
    DIRECTORY/samples/lock                    held by whoever changes `id` or `used`, or makes room

No sample's file is ever changed, so whoever finds one finds all of it, unless the machine failed; a checksum tells. What was
used last is what was read or written last, by the time of change that each file has anyway.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from taid_ray.config.training import CacheConfig
from taid_ray.errors import ConfigError
from taid_ray.teacher.cache.files import (
    SUFFIX,
    Entry,
    is_abandoned,
    list_files,
    on_disk,
    remove_oldest,
    seal,
    total_bytes,
    unseal,
)

WRITERS = 64
"""Processes that may write at the same time without exceeding the limit together."""
FULL, MADE_ROOM = 0.9, 0.8
"""Parts of the limit: where room is made, and down to where."""
LOCK_S = 60.0
"""Seconds that a writer waits for the lock. Counting many files on a network file system may take as long."""
TOUCH_S = 60.0
"""Precision of a file's time of use, so that a file that is read often is not written often."""


class CacheStore:
    """Samples by their key. Thread-safe.

    `get` and `put` never raise: what cannot be read counts as missing, and what cannot be written is dropped.

    A writer adds its next allowance to `used` before it writes, and `used` never exceeds FULL of the limit. Only where it would,
    the files are counted, and the oldest are removed if that much is really in use. The count misses what other writers may
    still write of their allowances; WRITERS allowances fit between FULL and the limit.
    """

    def __init__(self, config: CacheConfig, notify: Callable[[str], None]):
        """config: with a directory. notify: is told, once, why the cache does not work."""
        self._root, self._limit = samples_directory(str(config.directory)), int(config.disk_gib * 2**30)
        self._notify = notify
        self._lock, self._patience_s = FileLock(self._root / "lock"), LOCK_S
        self._allowance = int((1 - FULL) * self._limit / WRITERS)
        self._may_write = 0
        """Bytes that are counted as used already, and are this process's to write."""
        self._writing = threading.Lock()
        self._said = False

    @cached_property
    def scope(self) -> str:
        """The same name for all processes that use this very directory, and for no others."""
        path = self._root.parent / "id"
        try:
            scope = path.read_text() if path.exists() else ""
            if not scope:
                with self._writing, self._locked():
                    scope = (path.read_text() if path.exists() else "") or uuid.uuid4().hex
                    path.write_text(scope)
            return scope
        except OSError:  # `put` says so
            return uuid.uuid4().hex

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Returns a sample's tensors, or None if there are none. Removes a file that is damaged."""
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
        tensors = unseal(content, key)
        with suppress(OSError):  # another user's, or gone meanwhile
            if tensors is None:
                path.unlink()
            elif age_s > TOUCH_S:
                os.utime(path)
        return tensors

    def has(self, key: str) -> bool:
        """Tells whether there is a sample's file. It may be damaged, of which `get` takes care."""
        return self._path(key).exists()

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keeps the tensors of a sample if there is room for them. Waits up to LOCK_S for the lock, which it seldom needs."""
        content = seal(key, tensors)
        size = on_disk(len(content))
        with self._writing:
            try:
                if size <= self._may_write:
                    self._may_write -= size
                    self._write(key, content)
                    return
                with self._locked():
                    if self._reserve(size):
                        self._write(key, content)
            except OSError as error:
                self._say(f"cannot keep more ({error})")

    def entries(self) -> list[Entry]:
        """Lists all files, half written ones too. Raises OSError."""
        entries: list[Entry] = []
        with suppress(FileNotFoundError), os.scandir(self._root) as directories:
            for directory in directories:
                if directory.is_dir():
                    entries.extend(list_files(directory.path))
        return entries

    def prune(self, max_bytes: int) -> int:
        """Removes the files that were not used for longest until at most `max_bytes` are left; returns how many.

        Raises OSError.
        """
        if not self._root.is_dir():
            return 0
        with self._writing, self._locked():
            entries = self._scan()
            removed = remove_oldest(entries, max_bytes)
            self._write_used(total_bytes(entries) - total_bytes(removed))
            return len(removed)

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / f"{key}{SUFFIX}"

    def _reserve(self, size: int) -> bool:
        """Counts a file of `size` bytes and a new allowance as used, making room if needed; False if there is none.

        To be called while the lock is held.
        """
        if size > MADE_ROOM * self._limit:
            self._say(f"is too small for a sample of {size / 2**20:.1f} MiB")
            return False
        most = int(FULL * self._limit)
        used = self._read_used()
        if used is not None:
            used = max(0, used - self._may_write)  # what is left of the last allowance is given back
        self._may_write = 0
        if used is None or used + size > most:
            entries = self._scan()
            used = total_bytes(entries)
            if used + size > most:
                used -= total_bytes(remove_oldest(entries, int(MADE_ROOM * self._limit) - size))
        room = most - used - size
        if room >= 0:
            self._may_write = min(self._allowance, room)
            used += size + self._may_write
        self._write_used(used)
        return room >= 0

    def _scan(self) -> list[Entry]:
        """Lists all files after removing what killed writers left. Slow, with one call of `stat` for each file."""
        return [entry for entry in self.entries() if not is_abandoned(entry)]

    def _read_used(self) -> int | None:
        """None if nobody has counted yet, or what was written is damaged."""
        try:
            return int((self._root / "used").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _write_used(self, used: int) -> None:
        # In place: after a rename, other nodes of a network file system may find the old file for a while. And not emptied
        # first: on a full disk there may be no room to write it again.
        path = self._root / "used"
        path.touch()
        with path.open("r+") as file:
            file.write(f"{used:020d}")
            file.truncate()  # what is longer is damaged

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
        """Holds the lock. Raises OSError if it is not got; after that this process does not wait until it was free once."""
        self._root.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock.acquire(timeout=self._patience_s):
                self._patience_s = LOCK_S
                yield
        except Timeout:
            waited_s, self._patience_s = self._patience_s, 0.0
            raise OSError(f"another process holds {self._lock.lock_file}, and still did after {waited_s:g} s") from None

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            self._notify(f"the cache of teacher outputs in {self._root} {what}; the run goes on without that part")


def check_directory(config: CacheConfig) -> None:
    """Raises ConfigError if there can be no cache in its directory."""
    if config.directory is None:
        return
    path = Path(config.directory).expanduser().absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        why = "may not be written to" if existing.is_dir() else "is a file"
        raise ConfigError(f"cache.directory: {path} cannot be used, because {existing} {why}; choose another directory")


def samples_directory(directory: str | Path) -> Path:
    """The directory of the samples in a cache.directory."""
    return Path(directory).expanduser() / "samples"
