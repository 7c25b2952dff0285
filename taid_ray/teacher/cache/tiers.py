"""The cache of teacher outputs as one process uses it: memory that the processes of a node share, before a directory."""

import fcntl
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from torch import Tensor

from taid_ray.config.schema import CacheConfig
from taid_ray.errors import ConfigError
from taid_ray.teacher.cache.store import CacheStore

SHARED_MEMORY = Path("/dev/shm")
HOLD_FILE = "held"


class Cache:
    """Both tiers. Thread-safe. `close` it: what nobody uses any more gives its memory back."""

    def __init__(self, config: CacheConfig, notify: Callable[[str], None]):
        """notify: is told, once, what of it does not work; that is never an error."""
        self._disk = self._memory = self._shared = None
        self.scope = _scope(config.directory)
        """The same for all processes that find here what each of them puts."""
        if config.directory is not None:
            self._disk = CacheStore(samples_directory(config.directory), int(config.disk_gib * 2**30), notify)
        if config.memory_gib > 0:
            try:
                self._shared = SharedDirectory(config.directory or "")
            except OSError as error:
                notify(f"the cache of teacher outputs has no memory in {SHARED_MEMORY}: {error}")
            else:
                self._memory = CacheStore(self._shared.path, _memory_limit(config.memory_gib, notify), notify)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a sample, if they are there. What was on disk only is in memory, too, from now on."""
        found = self._memory.get(key) if self._memory else None
        if found is None and self._disk is not None:
            found = self._disk.get(key)
            if found is not None and self._memory is not None:
                self._memory.put(key, found)
        return found

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        for store in (self._memory, self._disk):
            if store is not None:
                store.put(key, tensors)

    def close(self) -> None:
        if self._shared is not None:
            self._shared.leave()


def check_directory(config: CacheConfig) -> None:
    """Raises ConfigError if there can be no cache in its directory."""
    if config.directory is None:
        return
    path = Path(config.directory).expanduser().absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        found = "may not be written to" if existing.is_dir() else "is a file"
        raise ConfigError(
            f"cache.directory: {path} cannot be used, because {existing} {found}; choose another directory"
        )


def samples_directory(directory: str | Path) -> Path:
    """Where the samples are, in the cache of that directory."""
    return Path(directory).expanduser() / "samples"


def _memory_limit(wanted_gib: float, notify: Callable[[str], None]) -> int:
    """In bytes. Ray keeps its objects there, too, and its processes crash where no room is left for them."""
    most = shutil.disk_usage(SHARED_MEMORY).total // 3
    if wanted_gib * 2**30 > most:
        notify(
            f"note: cache.memory_gib: {wanted_gib:g} is more than a third of {SHARED_MEMORY} on this node, which others need, "
            f"too; {most / 2**30:.2g} are used"
        )
    return min(int(wanted_gib * 2**30), most)


def _scope(directory: str | None) -> str:
    """Of the node, or of the directory, which other nodes may share or not."""
    if directory is None:
        boot = Path("/proc/sys/kernel/random/boot_id")
        return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
    path = Path(directory).expanduser() / "id"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            found = file.read() or uuid.uuid4().hex
            if not file.tell():
                file.write(found)
            return found
    except OSError:  # the store says so
        return uuid.uuid4().hex


class SharedDirectory:
    """A directory in memory that lasts as long as some process of this node holds it.

    Each process holds a lock in it, which ends with the process however that ends. Whoever is alone at its end removes
    the directory; what the killed left behind goes when the next process comes.
    """

    def __init__(self, name: str):
        """Joins the directory for `name`, or makes it. Raises OSError."""
        digest = hashlib.sha256(name.encode()).hexdigest()
        self.path = SHARED_MEMORY / f"taid-ray-cache-{os.getuid()}-{digest[:16]}"
        for left in SHARED_MEMORY.glob(f"taid-ray-cache-{os.getuid()}-*"):
            _remove_if_left(left)
        for left in SHARED_MEMORY.glob(f"taid-ray-gone-{os.getuid()}-*"):  # its removal was interrupted
            shutil.rmtree(left, ignore_errors=True)
        self._file = self._hold()

    def leave(self) -> None:
        """Also removes it if nobody else holds it."""
        self._file.close()
        _remove_if_left(self.path)

    def _hold(self) -> IO[str]:
        while True:
            with suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            try:
                file = (self.path / HOLD_FILE).open("w")
            except FileNotFoundError:  # removed at this moment
                continue
            fcntl.flock(file, fcntl.LOCK_SH)
            if _is_still(self.path / HOLD_FILE, file):
                return file
            file.close()


def _remove_if_left(path: Path) -> None:
    """Removes a shared directory that no process holds."""
    try:
        with (path / HOLD_FILE).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path / HOLD_FILE, file):
                # Under another name first: whoever comes now makes a new one, and waits for nobody.
                gone = path.with_name(f"taid-ray-gone-{os.getuid()}-{uuid.uuid4().hex}")
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
    except OSError:
        return  # held, or gone


def _is_still(path: Path, file: IO[str]) -> bool:
    """Whether the open file is the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
