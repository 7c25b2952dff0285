"""The vision-language families whose models can be fed, each with how its images become tokens and model inputs.

To add a family, add its entry to `FAMILIES` and to the tests' `tests/support/tiny_vision.py`; the tests in tests/unit/media run
for every entry.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from taid_ray.errors import ModelError

LARGEST_SIDE = 4096
"""Pixels of the longer side, beyond which Idefics3 and SmolVLM never enlarge an image."""
Measure = Callable[[Any, int, int], dict[str, Any]]
"""(image processor, height, width) -> what the family's processor reads to write the tokens of one image of that size."""


@dataclass(frozen=True)
class Family:
    """What taid-ray knows of the models of one type."""

    join: Literal["tiles", "grid", "rows"]
    """How the images of a batch become one tensor. `tiles`: their tiles one after the other; `grid`: their patches one after
    the other, with the grid of each; `rows`: [B, n, ...], the tiles of each row padded with zeros."""
    inputs: tuple[str, ...]
    """Names of the tensors that the model takes for its images."""
    measure: Measure
    vision: tuple[str, ...]
    """Names of the modules that only images go through, as `student.freeze` takes them."""
    mrope: bool = False
    """Positions have three coordinates: time, row and column."""
    packs: bool = True
    """Documents packed into one row leave each other's bits alone."""
    torchvision: bool = False
    """The processor cannot be made without the package torchvision, even to process images with Pillow."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """What the family's processor passes to its image processor on every call."""
    expansion: Mapping[str, Any] = field(default_factory=dict)
    """What the family's processor passes to its own `replace_image_token`."""


def family_of(model_config: Any, key: str) -> Family:
    """Looks up the family of a transformers config. Raises ModelError, naming `key`, if images cannot be fed to it."""
    kind = model_config.model_type
    if kind not in FAMILIES:
        raise ModelError(
            f"{key}: taid-ray cannot feed images to a model of type {kind} (it can to: {', '.join(sorted(FAMILIES))}); choose "
            "another model, or remove data.images_column"
        )
    return FAMILIES[kind]


def _tiles(images: Any, height: int, width: int) -> dict[str, Any]:
    return {"num_patches": [images.get_number_of_image_patches(height, width, {"crop_to_patches": True})]}


def _one_tile(images: Any, height: int, width: int) -> dict[str, Any]:
    """The shape of the pixels after resizing and cropping, which must not depend on the image."""
    size = images.crop_size if images.do_center_crop else images.size
    if not (size["height"] and size["width"]):
        raise ValueError("its image processor makes images of different sizes")
    return {"pixel_values": [np.broadcast_to(np.float32(0), (3, size["height"], size["width"]))]}


def _lfm2_tiles(images: Any, height: int, width: int) -> dict[str, Any]:
    tokens = {"encoder_patch_size": images.encoder_patch_size, "downsample_factor": images.downsample_factor}
    most = {"max_image_tokens": images.max_image_tokens}
    large = images._is_image_too_large(
        height, width, max_pixels_tolerance=images.max_pixels_tolerance, **tokens, **most
    )
    size = images.smart_resize(height, width, min_image_tokens=images.min_image_tokens, **tokens, **most)
    if math.prod(side // images.encoder_patch_size for side in size) > images.max_num_patches:
        raise ValueError("it is too long and narrow")
    columns = rows = 1
    if large and images.do_image_splitting:
        tiles = {"min_tiles": images.min_tiles, "max_tiles": images.max_tiles, "tile_size": images.tile_size}
        columns, rows, *_ = images._get_grid_layout(height, width, **tiles)
    return {"image_rows": [rows], "image_cols": [columns], "image_sizes": [list(reversed(size))]}


def _grid(images: Any, height: int, width: int) -> dict[str, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limits = {"min_pixels": images.size["shortest_edge"], "max_pixels": images.size["longest_edge"]}
    resized = smart_resize(height, width, images.patch_size * images.merge_size, **limits)
    return {"image_grid_thw": np.array([[1, *(side // images.patch_size for side in resized)]])}


def _rows_and_columns(images: Any, height: int, width: int) -> dict[str, Any]:
    """The tiles of an image that is enlarged to a multiple of a tile's side.

    Follows the image processor step by step: its own `get_number_of_image_patches` leaves out that every step rounds.
    """
    if not images.do_image_splitting:
        return {"rows": [[0]], "cols": [[0]]}
    tile = images.max_image_size["longest_edge"]
    height, width = _scaled(height, width, images.size["longest_edge"])
    height, width = (height + height % 2, width) if width >= height else (height, width + width % 2)
    if max(height, width) > LARGEST_SIDE:
        height, width = _scaled(height, width, LARGEST_SIDE)
    height, width = _scaled(height, width, math.ceil(max(height, width) / tile) * tile)
    rows, columns = math.ceil(height / tile), math.ceil(width / tile)
    if rows * columns == 1:
        rows = columns = 0
    return {"rows": [[rows]], "cols": [[columns]]}


def _scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    ratio = width / height
    return (max(1, int(longest / ratio)), longest) if width >= height else (longest, max(1, int(longest * ratio)))


_QWEN = Family(
    join="grid",
    inputs=("pixel_values", "image_grid_thw"),
    measure=_grid,
    vision=("visual",),
    mrope=True,
    torchvision=True,
)
_IDEFICS = Family(
    join="rows",
    inputs=("pixel_values", "pixel_attention_mask"),
    measure=_rows_and_columns,
    vision=("vision_model", "connector"),
    call={"return_row_col_info": True},
)
_TOWER = ("vision_tower", "multi_modal_projector")

FAMILIES: dict[str, Family] = {
    "internvl": Family("tiles", ("pixel_values",), _tiles, _TOWER, torchvision=True, call={"crop_to_patches": True}),
    "llava": Family("tiles", ("pixel_values",), _one_tile, _TOWER),
    "lfm2_vl": Family(
        join="tiles",
        inputs=("pixel_values", "spatial_shapes", "pixel_attention_mask"),
        measure=_lfm2_tiles,
        vision=_TOWER,
        packs=False,
        torchvision=True,
        call={"return_row_col_info": True},
        expansion={"use_image_special_tokens": True},
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "idefics3": _IDEFICS,
    "smolvlm": Family(**{**vars(_IDEFICS), "torchvision": True}),
}
"""By `model_type` of transformers."""
