"""Checks of the processors of images of both models before a run: they must fit their models, each other, and the data."""

import tempfile
from typing import Any

import numpy as np
import torch

from taid_ray.config.models import StudentConfig, TeacherConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ConfigError, ModelError
from taid_ray.media.processor import PROBES, MediaProcessor, MediaSettings, drawn, load_media_processor
from taid_ray.media.refs import ImageRef
from taid_ray.models.pair import media_of, tokenizer_section
from taid_ray.models.student_init import origin


def check_media(
    config: DistillConfig, tokens: MediaProcessor, teacher_config: Any, student_config: Any, num_shared: int
) -> list[str]:
    """Checks all that can be known of a run's images without reading one, and without weights.

    tokens: the processor of `pair.run_media`. *_config: transformers configs of both models; the teacher's is None where there is
    none. num_shared: ids that both models have. Returns sentences that say what may not be meant. Raises ConfigError or
    ModelError.
    """
    settings, loaded = tokens.settings, {id(tokenizer_section(config)): tokens}

    def media_of_section(section: StudentConfig | TeacherConfig) -> MediaProcessor:
        if id(section) not in loaded:
            loaded[id(section)] = media_of(section, settings)
        return loaded[id(section)]

    student = media_of_section(origin(config))
    sides = [("student", student, student_config)]
    notes = []
    if config.teacher is not None:
        teacher = media_of_section(config.teacher)
        sides.append(("teacher", teacher, teacher_config))
        notes = compare_sides(student, teacher)
    for section, media, model_config in sides:
        token = model_config.image_token_id
        if media.image_token_id != token or token >= num_shared:
            raise ModelError(
                f"{section}.model: its processor writes the token {media.image_token_id} for images, where its config.json names "
                f"{token}, and both models share the ids below {num_shared}; choose a model whose processor and config agree"
            )
        if config.data.pack and not media.family.packs:
            raise ConfigError(
                f"data.pack: true: a {section} of type {model_config.model_type} lets documents packed into one row see each "
                "other; set data.pack: false"
            )
    _check_saved(student, student_config, settings)
    return notes


def _check_saved(student: MediaProcessor, student_config: Any, settings: MediaSettings) -> None:
    """Raises ModelError if RUN/model will not have the processor that the student is trained with."""
    with tempfile.TemporaryDirectory() as directory:
        student_config.save_pretrained(directory)
        student.processor.save_pretrained(directory)
        again = load_media_processor(directory, settings, "student.model")
    if again.identity() != student.identity():
        raise ModelError(
            f"student.model: {type(student.processor).__name__}, once saved and loaded again, makes other tokens or pixels of "
            "images; choose another student, or report its name"
        )


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
