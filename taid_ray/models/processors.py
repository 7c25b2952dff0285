"""Comparison of what the processors of teacher and student make of images: both must see the same rows of tokens."""

import numpy as np
import torch

from taid_ray.errors import ModelError
from taid_ray.media.processor import PROBES, MediaProcessor, drawn
from taid_ray.media.refs import ImageRef


def compare_sides(student: MediaProcessor, teacher: MediaProcessor) -> list[str]:
    """Compares what both processors make of drawn images of several sizes.

    The tokens of an image must be the same, because one row of tokens goes to both models; each model gets its own pixels.
    Returns sentences that say where those differ. Raises ModelError for other tokens.
    """
    if student.image_token_id != teacher.image_token_id:
        raise ModelError(
            f"teacher and student have different tokens for images (ids {teacher.image_token_id} and {student.image_token_id}); "
            "choose a student of the teacher's family"
        )
    for width, height in PROBES:
        _compare_tokens(student, teacher, width, height)
    differing = [f"{width}x{height}" for width, height in PROBES if _pixels_differ(student, teacher, width, height)]
    if not differing:
        return []
    return [f"teacher and student process images of {', '.join(differing)} differently; each gets its own pixels"]


def _compare_tokens(student: MediaProcessor, teacher: MediaProcessor, width: int, height: int) -> None:
    found, expected = (side.layout(width, height).ids for side in (student, teacher))
    if np.array_equal(found, expected):
        return
    shorter = min(len(found), len(expected))
    (places,) = np.nonzero(found[:shorter] != expected[:shorter])
    first = int(places[0]) if len(places) else shorter
    raise ModelError(
        f"teacher and student make other tokens of an image of {width}x{height} ({len(expected):,} and {len(found):,}, first "
        f"different at {first}); set data.image_processor, or choose a student of the teacher's family"
    )


def _pixels_differ(student: MediaProcessor, teacher: MediaProcessor, width: int, height: int) -> bool:
    tokens = len(student.layout(width, height).ids)
    ref, content = ImageRef("0" * 32, 0, tokens, width, height, "drawn"), drawn(width, height)
    one, other = (side.picture(ref, content).tensors for side in (student, teacher))
    return one.keys() != other.keys() or any(not torch.equal(one[name], other[name]) for name in one)
