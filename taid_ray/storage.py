"""Storage by name: a directory of this machine, or a URI such as s3://bucket/path; and patience with storage that fails."""

import time
from collections.abc import Callable
from typing import TypeVar

from fsspec.core import url_to_fs
from pyarrow import ArrowException, ArrowInvalid
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

STORAGE_ERRORS = (OSError, ArrowException)
"""What reading and writing raise."""
LASTING_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What a file that is missing or forbidden raises, which does not pass by itself."""
TRIES, PAUSE_S, LONGEST_PAUSE_S = 20, 0.05, 10.0
"""What fails is tried again after pauses that double, for two minutes altogether."""
T = TypeVar("T")


def open_storage(location: str) -> tuple[FileSystem, str]:
    """Opens a location as Ray does: Arrow's own kinds (local, s3, gs, hdfs), and all that fsspec has a package for.

    Returns the file system and the location's path in it. Raises ValueError, ImportError or one of STORAGE_ERRORS if there is
    no such kind of storage here.
    """
    if "://" not in location:
        return FileSystem.from_uri(location)
    try:
        return FileSystem.from_uri(location)
    except ArrowInvalid:
        fs, path = url_to_fs(location)
        return PyFileSystem(FSSpecHandler(fs)), path


def persistently(action: Callable[[], T], lasting: tuple[type[Exception], ...] = ()) -> T:
    """Returns what `action` returns. Calls it again while it raises one of STORAGE_ERRORS, TRIES times in all.

    lasting: errors that are raised at once.
    """
    for attempt in range(TRIES - 1):
        try:
            return action()
        except lasting:
            raise
        except STORAGE_ERRORS:
            time.sleep(min(PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
    return action()
