"""Reading the bytes of images from where they lie: files, zip archives, packs of the store, and memory.

Places: `file:PATH`; `zip:ARCHIVE!MEMBER`; `pack:FILE@OFFSET+BYTES`, a part of a file; `memory:`, by the digest. A relative PATH
is one in the directory or archive of images that the configuration names, see `resolved`.
"""

import errno
import os
import posixpath
import re
import stat
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import xxhash

from taid_ray.errors import DataError
from taid_ray.media.headers import BadImage
from taid_ray.media.refs import ImageRef
from taid_ray.storage import LASTING_ERRORS, persistently

MOST_BYTES = 128 << 20
"""Largest encoded image; what is larger is no picture that a model is given, or a trap."""
OPEN_ARCHIVES = 8
"""Zip archives that a reader keeps open, with the list of their members."""
UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""Numbers of errors that say that something is no file, or never can be."""
ZIP_PLACE = re.compile(r"(.*?\.zip)!(.*)", re.IGNORECASE | re.DOTALL)
PACK_PLACE = re.compile(r"(.*)@(\d+)\+(\d+)", re.DOTALL)


def digest_of(content: bytes) -> str:
    """Hashes an encoded image: `ImageRef.digest`."""
    return xxhash.xxh3_128_hexdigest(content)


def resolved(place: str, directory: str | None) -> str:
    """Returns a place with a relative path of an image put into `directory`, a folder or a zip archive."""
    kind, _, path = place.partition(":")
    if kind != "file" or directory is None or path.startswith("/"):
        return place
    if is_archive(directory):
        return f"zip:{directory}!{posixpath.normpath(path)}"
    return f"file:{directory.rstrip('/')}/{path}"


def is_archive(directory: str) -> bool:
    """Tells whether a directory of images is a zip archive, by its name."""
    return directory.lower().endswith(".zip")


def version_of(place: str) -> tuple[int, int]:
    """Returns size and time of the last change, in ns, of the file or archive of a place; (-1, 0) if there is none."""
    path = place.partition(":")[2]
    if place.startswith("zip:") and (found := ZIP_PLACE.fullmatch(path)):
        path = found[1]
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # reading says more
        return -1, 0
    return status.st_size, status.st_mtime_ns


class ImageReader:
    """Reads images by their references. For use by several threads at once."""

    def __init__(self, memory: Mapping[str, bytes] | None = None) -> None:
        """memory: the images whose place is `memory:`, by their digests."""
        self._memory = {} if memory is None else memory
        self._archives: OrderedDict[str, zipfile.ZipFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, ref: ImageRef) -> bytes:
        """Returns the encoded image. Raises DataError if it cannot be read, or is another one than the reference says."""
        try:
            content = self._memory[ref.digest] if ref.place == "memory:" else self.content(ref.place)
        except (BadImage, KeyError) as error:
            reason = error if isinstance(error, BadImage) else "is not in memory"
            raise DataError(
                f"the image {ref.place} {reason}, though the data were prepared with it; restore it"
            ) from None
        if (found := digest_of(content)) != ref.digest:
            raise DataError(
                f"the image {ref.place} has changed since the data were prepared (hash {ref.digest} then, {found} now); restore "
                f"it, or remove the encoded data (data.store) to have them made anew"
            )
        return content

    def content(self, place: str) -> bytes:
        """Returns what lies at a place.

        Raises BadImage for what is missing, is no file, or cannot be unpacked; DataError for what cannot be read just now.
        """
        kind, _, where = place.partition(":")
        try:
            if kind == "zip" and (found := ZIP_PLACE.fullmatch(where)):
                return self._member(found[1], found[2])
            if kind == "pack" and (found := PACK_PLACE.fullmatch(where)):
                return persistently(lambda: _part(found[1], int(found[2]), int(found[3])), LASTING_ERRORS)
            return persistently(lambda: _whole(where), LASTING_ERRORS)
        except (FileNotFoundError, NotADirectoryError):
            raise BadImage("is missing") from None
        except IsADirectoryError:
            raise BadImage("is a directory") from None
        except ValueError as error:  # a NUL or half a character in the name
            raise BadImage(f"cannot be the name of a file ({error})") from None
        except OSError as error:
            raise DataError(
                f"the image {place} cannot be read ({error}); check its permissions, and the disk or the network that it is on"
            ) from None

    def _member(self, archive: str, name: str) -> bytes:
        """Reads and unpacks a member of a zip archive."""
        try:
            with self._lock:
                return persistently(lambda: self._unpacked(archive, name), LASTING_ERRORS)
        except (OSError, BadImage):
            raise
        except zipfile.BadZipFile as error:
            raise BadImage(f"cannot be unpacked ({error})") from None
        except Exception as error:  # encrypted, of an unknown compression, damaged: zipfile and zlib raise many classes
            raise BadImage(f"cannot be unpacked ({' '.join(str(error).split()) or type(error).__name__})") from None

    def _unpacked(self, archive: str, name: str) -> bytes:
        try:
            opened = self._opened(archive)
            try:
                member = opened.getinfo(name)
            except KeyError:
                raise BadImage(f"is missing ({archive} has no such member{_example(opened)})") from None
            if member.is_dir():
                raise BadImage("is a directory")
            if member.file_size > MOST_BYTES:
                raise BadImage(f"has {member.file_size:,} bytes, more than {MOST_BYTES:,}")
            return opened.read(member)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a damaged archive that sends its reader before the beginning of the file
                raise BadImage(f"cannot be unpacked ({archive} is damaged)") from None
            if (broken := self._archives.pop(archive, None)) is not None:  # its handle may be stale
                broken.close()
            raise

    def _opened(self, archive: str) -> zipfile.ZipFile:
        if archive not in self._archives:
            if not Path(archive).exists():
                raise BadImage(f"is missing ({archive} does not exist)")
            self._archives[archive] = zipfile.ZipFile(archive)
            if len(self._archives) > OPEN_ARCHIVES:
                self._archives.popitem(last=False)[1].close()
        self._archives.move_to_end(archive)
        return self._archives[archive]


def _example(archive: zipfile.ZipFile) -> str:
    name = next((member.filename for member in archive.infolist() if not member.is_dir()), None)
    return "" if name is None else f"; it has {name}, for example"


def _whole(path: str) -> bytes:
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("is no regular file")
        if status.st_size > MOST_BYTES:
            raise BadImage(f"has {status.st_size:,} bytes, more than {MOST_BYTES:,}")
        return file.read()


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; a pipe would wait for somebody who writes into it."""
    try:
        return os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in UNUSABLE:
            raise BadImage(f"cannot be opened ({os.strerror(error.errno)})") from None
        raise


def _part(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise BadImage(f"is not whole ({len(content):,} of its {size:,} bytes are there)")
    return content
