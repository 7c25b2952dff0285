"""Grey images in place of others: what a model is shown to find out whether it looks at images at all."""

from collections.abc import Callable
from dataclasses import replace

import xxhash

from taid_ray.media.pictures import Images
from taid_ray.media.refs import ImageRef


def greyed(images: Images, grey: Callable[[ImageRef], bytes], memory: dict[str, bytes]) -> Images:
    """Puts a grey image of the same size in the place of each image of a batch's rows, so that all tokens stay as they are.

    grey: makes its bytes, see `MediaProcessor.grey`. memory: gets them by their digests, for the reader of images.
    """

    def one(image: ImageRef) -> ImageRef:
        content = grey(image)
        digest = xxhash.xxh3_128_hexdigest(content)
        memory[digest] = content
        return replace(image, digest=digest, place="memory:")

    return tuple(tuple(map(one, row)) for row in images)
