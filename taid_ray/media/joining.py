"""Joins the images of a batch's rows into the tensors that a model takes, and makes positions of three coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taid_ray.media.families import Family


@dataclass(frozen=True)
class Picture:
    """An image of a row, processed for one model."""

    start: int
    """Index in the row of its first token."""
    tokens: int
    """Number of its tokens, all in one run."""
    tensors: dict[str, Tensor]
    """Its part of the model's image inputs: tiles or patches, float32, and what the family has besides, first dimension each."""
    features: int
    """Number of its tokens in whose place the model puts what its vision tower saw."""


def joined(family: Family, pictures: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """The image inputs of a batch; {} where no row has an image.

    pictures: those of each row, in the order of their tokens.
    """
    found = {
        name: [[picture.tensors[name] for picture in row] for row in pictures]
        for name in family.inputs
        if any(pictures)
    }
    if family.join == "rows":
        return {name: _padded(rows) for name, rows in found.items()}
    return {name: torch.cat([tensor for row in rows for tensor in row]) for name, rows in found.items()}


def _padded(rows: list[list[Tensor]]) -> Tensor:
    """[B, n, ...]: each row's tensors one after the other, then zeros; raises ValueError if their tiles differ in shape."""
    tiles = [torch.cat(row) if row else None for row in rows]
    shapes = {tuple(found.shape[1:]) for found in tiles if found is not None}
    if len(shapes) > 1:
        raise ValueError(f"tiles of a batch differ in shape: {sorted(shapes)}")
    some = next(found for found in tiles if found is not None)
    most = max(len(found) for found in tiles if found is not None)
    padded = some.new_zeros(len(rows), most, *some.shape[1:])
    for number, found in enumerate(tiles):
        if found is not None:
            padded[number, : len(found)] = found
    return padded


def mrope_positions(position_ids: Tensor, pictures: Sequence[Sequence[Picture]], merge: int) -> Tensor:
    """Positions [4, B, T] for a model with three coordinates, from positions [B, T] that restart with each document.

    The first plane is `position_ids`, of which transformers makes the mask of packed rows. In the others (time, row, column) a
    token of text is one further than the one before it; an image of h x w tokens that starts at c has (c, c + y, c + x), and what
    follows it goes on at c + max(h, w) (Qwen2-VL, arXiv 2409.12191, section 2.1).

    merge: patches per token along each side, so that h x w is the picture's `image_grid_thw` divided by it.
    """
    positions = position_ids.expand(4, *position_ids.shape).clone()
    for row, found in enumerate(pictures):
        restarts = torch.nonzero(position_ids[row, 1:] != position_ids[row, :-1] + 1).flatten() + 1
        for picture in found:
            _, height, width = (picture.tensors["image_grid_thw"][0] // torch.tensor([1, merge, merge])).tolist()
            start, end = picture.start, picture.start + picture.tokens
            first = int(positions[1, row, start])
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            positions[1, row, start:end] = first
            positions[2, row, start:end] = first + y.flatten()
            positions[3, row, start:end] = first + x.flatten()
            later = restarts[restarts >= end]
            stop = int(later[0]) if len(later) else position_ids.shape[1]
            positions[1:, row, end:stop] += max(height, width) - picture.tokens
    return positions
