"""The images of a run in one of its processes: what they become, and how their bytes are read."""

import threading
from collections import OrderedDict

from taid_ray.data.images import EncoderMedia
from taid_ray.media.processor import MediaProcessor
from taid_ray.media.reader import ImageReader
from taid_ray.media.refs import ImageRef

RECENT_BYTES = 64 << 20
"""Bytes of the images read last that are kept, since a request to the teacher and the student's own step want the same ones."""


class RunImages:
    """Reads images, also those that documents held themselves, which it keeps. For use by several threads at once."""

    def __init__(self, processor: MediaProcessor):
        """processor: of the model whose tokens the data have."""
        self.processor = processor
        self.memory: dict[str, bytes] = {}
        """Bytes of the images that have no file of their own, by their digests."""
        self.encoder_media = EncoderMedia(processor, self._keep)
        """What an encoder needs so that the images of its rows can be read here."""
        self._reader = ImageReader(self.memory)
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._recent_bytes = 0
        self._lock = threading.Lock()

    def read(self, image: ImageRef) -> bytes:
        """Returns the encoded image. Raises DataError as ImageReader."""
        if image.place == "memory:":
            return self._reader.read(image)
        with self._lock:
            found = self._recent.get(image.digest)
        if found is None:
            found = self._reader.read(image)
            self._remember(image.digest, found)
        return found

    def _remember(self, digest: str, content: bytes) -> None:
        with self._lock:
            self._recent_bytes += len(content) - len(self._recent.pop(digest, b""))
            self._recent[digest] = content
            while self._recent_bytes > RECENT_BYTES:
                self._recent_bytes -= len(self._recent.popitem(last=False)[1])

    def _keep(self, digest: str, content: bytes) -> str:
        self.memory[digest] = content
        return "memory:"
