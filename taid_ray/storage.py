"""Storage by name: a directory of this machine, or a URI such as s3://bucket/path."""

from fsspec.core import url_to_fs
from pyarrow import ArrowException, ArrowInvalid
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

STORAGE_ERRORS = (OSError, ArrowException)
"""What reading and writing raise."""


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
