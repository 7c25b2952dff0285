"""The pack of a shard: the images that its documents hold as bytes, each once, one after the other in a file beside it.

Images that are files of their own, or members of an archive, stay where they are.
"""

import os
from pathlib import Path
from typing import BinaryIO

from taid_ray.data.store.sealed import seal, temporary_of, unwritten


def pack_name(shard: str) -> str:
    """Returns the name of the file of a shard's pack."""
    return f"{shard}-images.pack"


class Pack:
    """A pack while its shard is made. There is a file only if there is an image."""

    def __init__(self, directory: Path, shard: str) -> None:
        self._path, self._shard = directory / pack_name(shard), shard
        self._file: BinaryIO | None = None
        self._size = 0
        self._places: dict[str, str] = {}

    def keep(self, digest: str, content: bytes) -> str:
        """Stores an image, unless it is there, and returns its place: `pack:SHARD@OFFSET+BYTES`. Raises RunError."""
        if digest not in self._places:
            try:
                self._file = self._file or temporary_of(self._path).open("wb")
                self._file.write(content)
            except OSError as error:
                raise unwritten(self._path, error) from error
            self._places[digest] = f"pack:{self._shard}@{self._size}+{len(content)}"
            self._size += len(content)
        return self._places[digest]

    def seal(self) -> bool:
        """Puts the file in its place, if there is an image; returns whether there is. Raises RunError."""
        if self._file is None:
            return False
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            seal(self._path, {"images": len(self._places)})
        except OSError as error:
            raise unwritten(self._path, error) from error
        return True

    def close(self) -> None:
        """Removes what is not sealed."""
        if self._file is not None:
            self._file.close()
            temporary_of(self._path).unlink(missing_ok=True)
