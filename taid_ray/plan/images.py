"""The images of a planned run: what a drawn one of the planned size becomes in the processors of both models."""

import io
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ConfigError
from taid_ray.media.joining import Picture, joined
from taid_ray.media.processor import MediaProcessor, drawn
from taid_ray.media.refs import ImageRef
from taid_ray.models.pair import media_of, media_settings
from taid_ray.models.student_init import origin

BYTES_PER_PIXEL = 0.17
"""Of a photograph as JPEG: 136 kB at 1024 x 768."""
TRIES = 3
"""Times that an image is processed; the fastest counts."""


@dataclass(frozen=True)
class Pixels:
    """What one model takes for one image."""

    tensors: dict[str, Tensor]
    """By the names of the model's inputs, of one row with this image alone."""
    by_row: bool
    """Their first dimension is the row and their second the tile, not the tiles or patches of all rows."""
    patches: int
    """Positions of the image inside of the vision tower."""
    seconds: float
    """Of processing it, measured where the plan is made."""

    def of(self, rows: int, per_row: int) -> dict[str, Tensor]:
        """Makes tensors without contents of the shapes that `rows` rows of `per_row` images have."""

        def shape(found: torch.Size) -> tuple[int, ...]:
            return (rows, per_row * found[1], *found[2:]) if self.by_row else (rows * per_row * found[0], *found[1:])

        return {
            name: torch.empty(shape(tensor.shape), dtype=tensor.dtype, device="meta")
            for name, tensor in self.tensors.items()
        }


@dataclass(frozen=True)
class RowImages:
    """The images of every row of a plan, all of one size."""

    per_row: int
    width: int
    height: int
    tokens: int
    """Positions of the row that one image takes."""
    file_bytes: float
    """Size of one image's file; assumed."""
    student: Pixels
    teacher: Pixels | None
    """None without a teacher."""

    @property
    def row_bytes(self) -> float:
        """Bytes of the files of a row's images."""
        return self.per_row * self.file_bytes

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures for JSON: pixels, bytes, seconds."""
        names = ("per_row", "width", "height", "tokens", "file_bytes")
        sides = {"student": self.student} | ({"teacher": self.teacher} if self.teacher else {})
        figures: dict[str, Any] = {name: getattr(self, name) for name in names}
        return figures | {name: {"patches": side.patches, "process_s": side.seconds} for name, side in sides.items()}


def row_images(
    config: DistillConfig, teacher_config: Any, student_config: Any, size: tuple[int, int], per_row: int
) -> RowImages | None:
    """Processes a drawn image as both models do; None in a run without images.

    *_config: transformers configs of both models. size: width and height in pixels. per_row: images of each row. Raises
    ConfigError if so many do not fit into a row, DataError or ModelError if the processors cannot be used.
    """
    settings = media_settings(config)
    if settings is None:
        return None
    media = media_of(origin(config), settings)
    tokens = len(media.layout(*size).ids)
    if per_row * tokens > config.data.sequence_length:
        raise ConfigError(
            f"--images-per-row {per_row}: images of {size[0]}x{size[1]} have {tokens:,} tokens each, more than a row of "
            f"data.sequence_length = {config.data.sequence_length:,} holds; lower --images-per-row, --image-size or "
            "data.image_processor, or raise data.sequence_length"
        )
    student = teacher = _pixels(media, student_config, size)
    if config.teacher is not None and origin(config) is not config.teacher:
        teacher = _pixels(media_of(config.teacher, settings), teacher_config, size)
    return RowImages(
        per_row=per_row,
        width=size[0],
        height=size[1],
        tokens=tokens,
        file_bytes=BYTES_PER_PIXEL * size[0] * size[1],
        student=student,
        teacher=teacher if config.teacher else None,
    )


def _pixels(media: MediaProcessor, model_config: Any, size: tuple[int, int]) -> Pixels:
    """Processes a drawn JPEG a few times, as one model takes it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(drawn(*size))).save(buffer, "JPEG")
    ref = ImageRef("0" * 32, 0, len(media.layout(*size).ids), *size, place="drawn")
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        picture = media.picture(ref, buffer.getvalue())
        seconds.append(time.perf_counter() - start)
    patches = _patches(picture, model_config.vision_config)
    return Pixels(joined(media.family, [[picture]]), media.family.join == "rows", patches, min(seconds))


def _patches(picture: Picture, vision_config: Any) -> int:
    """Counts the positions that an image has inside of the vision tower, padded ones included."""
    pixels = picture.tensors["pixel_values"]
    if pixels.dim() == 2:  # [patches, values]
        return len(pixels)
    if pixels.dim() == 3:  # [tiles, patches, values]
        return pixels.shape[0] * pixels.shape[1]
    patch = vision_config.patch_size
    height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
    return pixels.shape[0] * (pixels.shape[-2] // height) * (pixels.shape[-1] // width)
