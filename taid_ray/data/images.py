"""From what stands in a row of data to its images: their bytes are read, hashed and looked at, and tokens can stand for them.

A column of images, or a part of a message, holds bytes, a path, a mapping of both (as an Image feature of the library datasets;
the bytes win), or a list of these. Paths are relative to `data.images_directory`, a folder or a zip archive. Nothing is
downloaded, and nothing takes the place of an image that cannot be used.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from taid_ray.config.data import DataSource
from taid_ray.errors import DataError
from taid_ray.media.headers import BadImage, check_pixels, picture_size
from taid_ray.media.reader import ImageReader, digest_of, is_archive, resolved, version_of

IMAGE_MARK = "\ufdd0"
"""Stands for an image in the content of a message: a noncharacter, which no text has and every template keeps."""
TEXT_MARK = "<image>"
"""Stands for an image in the data of LLaVA and its followers."""
OWN_KEYS = ("image", "path", "bytes", "image_url", "url")
"""Keys under which a part of a message may have its image itself."""
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|data:")
BLOCK_DOCUMENTS_WITH_IMAGES = 16
"""Documents that are read and encoded together in a run with images, which are in memory with them."""
Keep = Callable[[str, bytes], str]
"""Takes an image's digest and bytes that have no file of their own, and returns the place where they can be read again."""


class ImageIds(Protocol):
    """The tokens that stand for an image of some size."""

    @property
    def ids(self) -> NDArray[np.int64]:
        """All of them in order."""


class ImageTokens(Protocol):
    """What encoding needs of a model's processor, a `media.processor.MediaProcessor`."""

    @property
    def image_token_id(self) -> int:
        """The token that a chat template writes for an image."""

    def layout(self, width: int, height: int) -> ImageIds:
        """Returns the tokens of an image, in whose place the template wrote one. Raises DataError for a size that is refused."""

    def identity(self) -> str:
        """Returns a hash of all that the tokens depend on."""


def in_memory(digest: str, content: bytes) -> str:
    """Forgets an image, whose digest is enough to look at a row."""
    return "memory:"


@dataclass(frozen=True)
class EncoderMedia:
    """What an encoder needs in a run with images."""

    tokens: ImageTokens
    keep: Keep = in_memory


@dataclass(frozen=True)
class FoundImage:
    """An image of a row that can be used."""

    digest: str
    """As in `ImageRef`."""
    width: int
    height: int
    place: str
    """As in `ImageRef`, but a path may be relative to `data.images_directory`."""


class SeenImage(NamedTuple):
    """A file of an image as it was read."""

    digest: str
    """Hash of its content; empty if it could not be read."""
    version: tuple[int, int]
    """As `media.reader.version_of` says."""


class UnusableRow(Exception):
    """Which image of a row cannot be used, and why, for which `data.bad_images: drop` leaves the row out."""


class ImageSource:
    """Reads the images of a source of data."""

    def __init__(self, config: DataSource, media: EncoderMedia) -> None:
        """Raises DataError if `config.images_directory` is neither a folder nor a zip archive."""
        self._config, self._media, self._reader = config, media, ImageReader()
        self.bytes: dict[str, int] = {}
        """Bytes of the images so far, by their digests."""
        self.outside: dict[str, SeenImage] = {}
        """The files that were asked for so far, by their places."""
        if (directory := config.images_directory) is not None:
            path = Path(directory)
            if not (path.is_file() if is_archive(directory) else path.is_dir()):
                raise DataError(
                    f"data.images_directory: {directory} is no folder, and no file whose name ends in .zip, on node "
                    f"{os.uname().nodename}. Name one that all nodes see."
                )

    def found(self, value: Any) -> FoundImage:
        """Reads and checks one image. Raises BadImage, or DataError for what cannot be read just now."""
        content, path = _content_and_path(value)
        place = ""
        if content is None:
            place = self._place(path)
            content = self._content(place)
        width, height = picture_size(content, self._config.max_image_pixels)
        if self._config.bad_images == "drop":  # what a later step would find must be known before rows are counted
            check_pixels(content, self._config.max_image_pixels)
        try:
            self._media.tokens.layout(width, height)
        except DataError as error:
            raise BadImage(f"does not suit the model: {error}") from None
        digest = digest_of(content)
        self.bytes[digest] = len(content)
        return FoundImage(digest, width, height, place or self._media.keep(digest, content))

    def _content(self, place: str) -> bytes:
        """Reads the file of an image, and notes what it was."""
        where = resolved(place, self._config.images_directory)
        self.outside[place] = SeenImage("", version_of(where))
        content = self._reader.content(where)
        self.outside[place] = SeenImage(digest_of(content), self.outside[place].version)
        return content

    def _place(self, path: str) -> str:
        if ADDRESS.match(path):
            raise BadImage("is an address; images are not downloaded")
        try:
            named = path.encode()
        except UnicodeEncodeError:  # half a character
            named = b"\0"
        if b"\0" in named:
            raise BadImage("cannot be the name of a file")
        if not path.startswith("/") and self._config.images_directory is None:
            raise DataError(
                f"data.images_directory: missing, and the data have images with relative paths ({_name(path)}). Set it to the "
                f"folder or the zip archive that they are in."
            )
        return f"file:{path}"


class RowImages:
    """The images of one row, which its messages take one after another."""

    def __init__(self, source: ImageSource, value: Any, where: str) -> None:
        """value: what stands in the column of images; None without one. where: begins every error."""
        self._source, self._where = source, where
        self._column = _listed(value)
        self._used = self._lacking = 0
        self.found: list[FoundImage] = []
        """Those of the marks so far, in order."""

    @property
    def in_column(self) -> bool:
        """Tells whether the column holds an image."""
        return bool(self._column)

    def mark(self, own: Any = None) -> str:
        """Returns IMAGE_MARK for the next image of the column, or for one that stands in the message itself.

        Raises UnusableRow if it cannot be used, and DataError if it cannot be read just now.
        """
        if own is None and self._used == len(self._column):
            self._lacking += 1  # said when all marks are known
            return IMAGE_MARK
        if own is None:
            own, self._used = self._column[self._used], self._used + 1
        try:
            self.found.append(self._source.found(own))
        except BadImage as error:
            name = _name(own)
            raise UnusableRow(f"image {len(self.found) + 1}{f' ({name})' if name else ''} {error}") from None
        except DataError as error:
            raise DataError(f"{self._where}: image {len(self.found) + 1}: {error}") from None
        return IMAGE_MARK

    def marked(self, text: str) -> str:
        """Returns a text with IMAGE_MARK for each `<image>` in it, if the column holds images."""
        first, *rest = text.split(TEXT_MARK) if self._column else [text]
        return first + "".join(self.mark() + part for part in rest)

    def rest(self) -> str:
        """Returns a mark for every image of the column, if there was no mark at all."""
        return "" if self.found or self._lacking else "".join(self.mark() for _ in self._column)

    def check_all_used(self) -> None:
        """Raises DataError if there were more or fewer marks than images."""
        images = len(self.found) + len(self._column) - self._used
        if self._lacking or self._used < len(self._column):
            raise DataError(
                f"{self._where} has {images} image(s) and {len(self.found) + self._lacking} mark(s) for them ({TEXT_MARK} in its "
                f"text, or parts of the type image). Give each image one mark, or none at all. Fix the row, or set "
                f"data.images_column."
            )


def _listed(value: Any) -> list[Any]:
    """Lists what a column holds; JSON text of a list, as tables of text have it, is read."""
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
    return list(value) if isinstance(value, list | tuple) else [value]


def _content_and_path(value: Any) -> tuple[bytes | None, str]:
    """Returns the bytes of an image, or else its path. Raises BadImage if there is neither."""
    if isinstance(value, Mapping):
        found = [value[key] for key in ("bytes", "path", "url") if value.get(key) not in (None, "")]
        value = found[0] if found else None
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), ""
    if isinstance(value, str) and value:
        return None, value
    raise BadImage("is missing" if value in (None, "", b"") else f"is no image but of the type {type(value).__name__}")


def _name(value: Any) -> str:
    """Returns the path of an image for messages; empty without one."""
    path = value.get("path") or value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        return ""
    shown = path if path.isprintable() else ascii(path)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."
