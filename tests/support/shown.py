"""Hand-made batches whose rows have images of noise, with the bytes of these."""

import io
from dataclasses import replace

import numpy as np
import xxhash

from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.media.processor import MediaProcessor
from taid_ray.media.refs import ImageRef
from tests.support.tiny_vision import row_ids


def noise(width: int, height: int, seed: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shown_row(media: MediaProcessor, contents: dict[str, bytes], seed: int, *parts: str | tuple[int, int]) -> Row:
    """A row of texts and pictures of noise; its last three tokens carry loss."""
    ids, images = row_ids(media, *parts)
    shown: list[ImageRef] = []
    for number, image in enumerate(images):
        content = noise(image.width, image.height, 10 * seed + number)
        shown.append(replace(image, digest=xxhash.xxh3_128_hexdigest(content)))
        contents[shown[-1].digest] = content
    targets = [ids[i + 1] if len(ids) - 4 <= i < len(ids) - 1 else NO_LABEL for i in range(len(ids))]
    return Row(ids, list(range(len(ids))), targets, images=tuple(shown))


def batch_with_images(media: MediaProcessor) -> tuple[Batch, dict[str, bytes]]:
    """Rows with one image, none and two, and one with an image behind its last loss position; the images' bytes."""
    contents: dict[str, bytes] = {}
    rows = [
        shown_row(media, contents, 1, "see", (40, 30), "a cat and a dog"),
        shown_row(media, contents, 2, "no picture at all"),
        shown_row(media, contents, 3, (32, 32), "and", (16, 64), "so on and on"),
    ]
    early = shown_row(media, contents, 4, "one, two, three", (30, 40))
    targets = np.full(len(early.input_ids), NO_LABEL)
    targets[2] = early.input_ids[3]
    return collate([*rows, replace(early, targets=targets)]), contents
