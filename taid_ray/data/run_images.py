"""The images of a run in one of its processes: what they become, and how their bytes are read."""

from taid_ray.data.images import EncoderMedia
from taid_ray.media.processor import MediaProcessor
from taid_ray.media.reader import ImageReader
from taid_ray.media.refs import ImageRef


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

    def read(self, image: ImageRef) -> bytes:
        """Returns the encoded image. Raises DataError as ImageReader."""
        return self._reader.read(image)

    def _keep(self, digest: str, content: bytes) -> str:
        self.memory[digest] = content
        return "memory:"
