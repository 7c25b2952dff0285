"""Makes pictures of the images of batches, in a thread, so that they are there when a model needs them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from taid_ray.media.joining import Picture
from taid_ray.media.processor import MediaProcessor
from taid_ray.media.refs import ImageRef

Images = tuple[tuple[ImageRef, ...], ...]
"""The images of each row of a batch, or () if there are none, as in `Batch.images`."""
Read = Callable[[ImageRef], bytes]
"""Reads the bytes of an image."""


def pictures_of(processor: MediaProcessor, images: Images, read: Read) -> tuple[tuple[Picture, ...], ...]:
    """Reads and processes the images of a batch's rows, each image once. Raises what `read` and `picture` raise."""
    made: dict[tuple[str, int, int], Picture] = {}

    def picture(ref: ImageRef) -> Picture:
        key = (ref.digest, ref.width, ref.height)
        if key not in made:
            made[key] = processor.picture(ref, read(ref))
        return replace(made[key], start=ref.start)

    return tuple(tuple(picture(ref) for ref in row) for row in images)


class Pictures:
    """The images of one model's batches: read and processed while the batch before is computed."""

    def __init__(self, processor: MediaProcessor, read: Read):
        self.processor, self._read = processor, read
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")
        self._begun: dict[Images, Future[tuple[tuple[Picture, ...], ...]]] = {}

    def prepare(self, images: Images) -> None:
        """Begins to process the images of a batch. Their pixels stay in memory until `inputs` asks for them: look one ahead."""
        if images and images not in self._begun:
            self._begun[images] = self._pool.submit(pictures_of, self.processor, images, self._read)

    def inputs(self, inputs: dict[str, Tensor], images: Images) -> dict[str, Tensor]:
        """The model inputs of a batch, as `MediaProcessor.inputs` makes them; waits for its images if need be.

        inputs: input_ids and position_ids, [B, T].
        """
        begun = self._begun.pop(images, None)
        found = begun.result() if begun else pictures_of(self.processor, images, self._read)
        return self.processor.inputs(inputs["input_ids"], inputs["position_ids"], found)

    def close(self) -> None:
        """Waits for the image being processed, and forgets those begun."""
        self._pool.shutdown(cancel_futures=True)
        self._begun.clear()
