"""The place of a store: a directory that all nodes see, or remote storage whose files are copied to each node.

Files of remote storage are made in a directory of the node and uploaded, NAME.json last; whoever needs one copies it to his
node, once for all processes there, and checks it. Nothing is removed from a node. Locks are a node's, so two nodes that
prepare the same span at once (two runs do) both encode it, and store the same bytes.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow.fs import FileType

from taid_ray.data.reading.retried import BUFFER_BYTES
from taid_ray.data.store.sealed import making, read_sealed, sealed_facts
from taid_ray.errors import ConfigError, DataError, RunError
from taid_ray.storage import STORAGE_ERRORS, open_storage, persistently

Location = str | Path
"""A directory, or the URI of remote storage."""


class Store:
    """A directory that all nodes see. Its files are used where they are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """Where files are made and read."""

    def create(self) -> None:
        """Makes the place of the files. Raises RunError if that is not possible."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"data.store: {self.directory} cannot be made ({error}); set data.store to another directory"
            ) from None

    def find(self, name: str, notify: Callable[[str], None]) -> dict[str, Any] | None:
        """Returns the facts of a file if it is stored whole, which is checked by its checksum, else None.

        Not to be called while the file is being made. notify: is told if it is damaged. Raises OSError or RunError.
        """
        return read_sealed(self.directory / name, notify)

    def fetch(self, name: str) -> Path:
        """Returns the path of a stored file. Raises DataError if it is remote and cannot be copied."""
        return self.directory / name

    def publish(self, name: str) -> None:
        """Makes a file that is whole in `directory` known to all nodes. Raises RunError if the storage does not take it."""


class RemoteStore(Store):
    """Remote storage, with a directory of this node that holds copies of its files."""

    def __init__(self, location: str, directory: Path) -> None:
        """location: the URI. directory: exists, and belongs to this location alone. Raises ConfigError."""
        super().__init__(directory)
        self._location, self._used = location, set[str]()
        try:
            self._fs, self._root = open_storage(location)
        except (ValueError, ImportError, *STORAGE_ERRORS) as error:
            raise ConfigError(
                f"data.store: {location} cannot be used: {error}; name a directory or a URI such as s3://bucket/path, and "
                "install what its kind of storage needs"
            ) from error

    def create(self) -> None:
        """Makes the place of the files. Raises RunError if that is not possible."""
        self._written("", lambda: self._fs.create_dir(self._root, recursive=True))

    def find(self, name: str, notify: Callable[[str], None]) -> dict[str, Any] | None:
        """Returns the facts of a file if it is stored whole, else None. Copies it to this node, or stores what is here."""
        path = self.directory / name
        said = read_sealed(path, lambda _: None)
        if said is None:
            return self._copy(path, notify)
        self.publish(name)
        return said

    def fetch(self, name: str) -> Path:
        """Returns the path of the copy of a file on this node, and makes it first if it is not there."""
        path = self.directory / name
        if name not in self._used or not path.exists():
            if sealed_facts(path) is None and self._copy(path, lambda _: None) is None:
                raise DataError(
                    f"the file {self._location}/{name} of encoded data is missing or damaged; start the run again to have "
                    "it made anew"
                )
            self._used.add(name)
        return path

    def publish(self, name: str) -> None:
        """Uploads a file that is whole on this node, unless it is stored already; its .json last."""
        path, facts = self.directory / name, _json(name)
        if self._size(name) == path.stat().st_size and self._size(facts) is not None:
            stored = BytesIO()
            self._download(facts, stored)
            if stored.getvalue() == path.with_suffix(".json").read_bytes():
                return
        self.create()
        for file in (name, facts):
            self._upload(file)

    def _copy(self, path: Path, notify: Callable[[str], None]) -> dict[str, Any] | None:
        """Copies a file to this node unless it is there whole; returns its facts, or None if it is not stored whole.

        What is damaged in the storage loses its .json, so that the next start makes it anew on whichever node. notify: is
        told so.
        """
        facts = _json(path.name)
        if self._size(facts) is None:
            return None
        with making(path, wait=True):
            said = read_sealed(path, lambda _: None)
            for _ in range(2):  # the second time because it may have been damaged on the way
                said = said or self._take(path)
            if said is None and self._size(facts) is not None:
                notify(f"{self._location}/{path.name} is damaged")
                self._written(facts, lambda: self._delete(facts))
        return said

    def _take(self, path: Path) -> dict[str, Any] | None:
        """Puts a file into its place on this node, and returns its facts, if what comes is whole."""
        copy = path.with_name(f"copy-of-{path.name}")
        try:
            for name in (path.name, _json(path.name)):
                if self._size(name) is None:
                    return None
                with path.with_name(f"copy-of-{name}").open("wb") as target:
                    self._download(name, target)
                    target.flush()
                    os.fsync(target.fileno())
            if (said := read_sealed(copy, lambda _: None)) is not None:
                copy.replace(path)
                copy.with_suffix(".json").replace(path.with_suffix(".json"))
            return said
        except OSError as error:
            raise self._unread(path.name, error) from error
        finally:
            copy.unlink(missing_ok=True)
            copy.with_suffix(".json").unlink(missing_ok=True)

    def _size(self, name: str) -> int | None:
        """The size of a stored file; None if there is none.

        Asked before a file is opened, where fsspec takes storage that fails for storage without the file.
        """
        try:
            info = persistently(lambda: self._fs.get_file_info(f"{self._root}/{name}"))
        except STORAGE_ERRORS as error:
            raise self._unread(name, error) from error
        return info.size if info.type == FileType.File else None

    def _download(self, name: str, target: BinaryIO) -> None:
        def download() -> None:
            target.seek(0)
            target.truncate()
            with self._fs.open_input_stream(f"{self._root}/{name}") as source:
                shutil.copyfileobj(source, target, BUFFER_BYTES)

        try:
            persistently(download)
        except STORAGE_ERRORS as error:
            raise self._unread(name, error) from error

    def _upload(self, name: str) -> None:
        def upload() -> None:
            goal = f"{self._root}/{name}"
            with (self.directory / name).open("rb") as source, self._fs.open_output_stream(goal) as target:
                shutil.copyfileobj(source, target, BUFFER_BYTES)

        self._written(name, upload)

    def _delete(self, name: str) -> None:
        try:
            self._fs.delete_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return  # another node was first

    def _written(self, name: str, action: Callable[[], None]) -> None:
        try:
            persistently(action)
        except STORAGE_ERRORS as error:
            raise RunError(
                f"data.store: {self._location}/{name} cannot be written ({error}); check the network and the access rights, "
                "and start the run again"
            ) from error

    def _unread(self, name: str, error: Exception) -> DataError:
        return DataError(
            f"the file {self._location}/{name} of encoded data cannot be copied to {self.directory} ({error}); check the "
            "network, the access rights and the room there, and start the run again"
        )


def open_store(location: Location) -> Store:
    """Opens a store by its directory or URI. Raises ConfigError if there is no such kind of storage.

    Copies of remote files are in the system's directory for temporary files (TMPDIR), in a directory for each user and store.
    Raises RunError if that cannot be made.
    """
    if "://" not in str(location):
        return Store(Path(location))
    return RemoteStore(str(location).rstrip("/"), _node_directory(str(location).rstrip("/")))


def inside(location: Location, name: str) -> Location:
    """Returns the location of something in a store."""
    return location / name if isinstance(location, Path) else f"{location.rstrip('/')}/{name}"


def parted(location: Location) -> tuple[Location, str]:
    """Returns the store and the name of a file in it, by the file's location."""
    if isinstance(location, Path):
        return location.parent, location.name
    store, _, name = location.rpartition("/")
    return store, name


def _json(name: str) -> str:
    return str(Path(name).with_suffix(".json"))


def _node_directory(location: str) -> Path:
    """Makes the directory of a store's copies, which others cannot write to. Raises RunError if it is somebody else's."""
    user = Path(tempfile.gettempdir()) / f"taid-ray-{os.getuid()}"
    directory = user / "encoded-data" / hashlib.sha256(location.encode()).hexdigest()[:16]
    try:
        user.mkdir(mode=0o700, exist_ok=True)
        if user.lstat().st_uid != os.getuid():
            raise PermissionError(f"{user} belongs to another user")
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the directory for copies of {location} cannot be made ({error}); set TMPDIR to a directory of yours"
        ) from error
    return directory
