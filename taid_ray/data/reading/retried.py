"""Opening data files so that a read that fails is tried again: the server of a network file system may be away for a while."""

import io
import os
from pathlib import Path
from typing import Any

from taid_ray.storage import LASTING_ERRORS, persistently

BUFFER_BYTES = 1 << 20


def open_retried(path: Path) -> io.BufferedReader:
    """Opens a file for reading, as it lies there. What fails while it is opened or read is tried again.

    Raises OSError, also while reading: at once for a file that is missing or forbidden, else after two minutes.
    """
    return io.BufferedReader(_RetriedFile(path), BUFFER_BYTES)


def size_of(path: Path) -> int:
    """The size of a file in bytes. Raises OSError as `open_retried` does."""
    return persistently(path.stat, LASTING_ERRORS).st_size


class _RetriedFile(io.RawIOBase):
    """A file that is opened anew after a read has failed, because the server may have forgotten the old handle."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._number: int | None = None
        persistently(self._open, LASTING_ERRORS)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = persistently(lambda: self._read(buffer), LASTING_ERRORS)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}
        self._at = (begin[whence] if whence in begin else size_of(self._path)) + offset
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._forget()
        super().close()

    def _read(self, buffer: Any) -> int:
        try:
            return os.preadv(self._open(), [buffer], self._at)
        except OSError:
            self._forget()
            raise

    def _open(self) -> int:
        """Returns the number of the open file, and opens it first if it is not."""
        if self._number is None:
            self._number = os.open(self._path, os.O_RDONLY)
        return self._number

    def _forget(self) -> None:
        number, self._number = self._number, None
        if number is not None:
            os.close(number)
