"""Checks that teacher and student fit each other and the data; their tokenizer; their shared vocabulary.

The config of a teacher is None where there is none.
"""

from typing import TYPE_CHECKING, Any

from taid_ray.config.models import StudentConfig, TeacherConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.models.hub import hub_names, offline_if_unreachable
from taid_ray.models.lengths import check_lengths
from taid_ray.models.loading import (
    check_attention,
    check_causal_lm,
    check_divisible,
    check_weights,
    load_model_config,
    load_tokenizer,
    section_name,
)
from taid_ray.models.saving import check_architecture
from taid_ray.models.student_init import check_student, has_teacher_tokenizer, student_model_config
from taid_ray.models.tokenizer import added_ids, check_saved_tokenizer, check_size
from taid_ray.models.vocabulary import Vocabulary, align

if TYPE_CHECKING:
    from taid_ray.media.processor import MediaProcessor, MediaSettings


def model_configs(config: DistillConfig) -> tuple[Any, Any]:
    """Loads the transformers configs of teacher and student. Raises ConfigError or ModelError."""
    offline_if_unreachable(hub_names(config))
    teacher = load_model_config(config.teacher) if config.teacher else None
    return teacher, student_model_config(config)


def check_models(config: DistillConfig, teacher_config: Any, student_config: Any) -> None:
    """Checks what can be known about both models without loading weights. Raises ConfigError or ModelError."""
    student, images = config.student, config.data.has_images
    if config.teacher:
        _check_teacher(config.teacher, teacher_config, student, images)
    if student.model is not None:
        check_causal_lm(student_config, "student.model", images)
        if student.init == "pretrained":
            check_weights(student)
    check_attention(student, student_config, images)
    check_student(config, student_config)
    check_architecture(config, student_config)
    check_lengths(config, teacher_config, student_config)


def _check_teacher(teacher: TeacherConfig, teacher_config: Any, student: StudentConfig, images: bool) -> None:
    check_causal_lm(teacher_config, "teacher.model", images)
    check_divisible(teacher_config, teacher.shards)
    if not teacher.is_stored or student.init == "cut":
        check_weights(teacher)
    if not teacher.is_stored:
        check_attention(teacher, teacher_config, images)


def tokenizer_section(config: DistillConfig) -> StudentConfig | TeacherConfig:
    """The section whose model the tokenizer of data and of RUN/model is from."""
    return config.given_teacher if has_teacher_tokenizer(config) else config.student


def run_tokenizer(config: DistillConfig) -> Any:
    """The tokenizer of data and of RUN/model: the student's own, or the teacher's where the student has none."""
    return load_tokenizer(tokenizer_section(config))


def run_media(config: DistillConfig, backend: str | None = None) -> "MediaProcessor | None":
    """The processor of images whose tokens stand in the data, of the model that has the tokenizer; None without images.

    backend: what processes images, as `image_backend` says where the run is started; by default as it says here. Raises
    ModelError if the model has none that is known.
    """
    settings = media_settings(config, backend)
    return None if settings is None else media_of(tokenizer_section(config), settings)


def media_settings(config: DistillConfig, backend: str | None = None) -> "MediaSettings | None":
    """Says how the run's images are processed; None without images. backend: as in `run_media`."""
    if not config.data.has_images:
        return None
    from taid_ray.media.processor import MediaSettings

    return MediaSettings(backend or image_backend(), config.data.image_processor)


def media_of(section: StudentConfig | TeacherConfig, settings: "MediaSettings") -> "MediaProcessor":
    """Loads the processor of images of a section's model. Raises ModelError if the model has none that is known."""
    from taid_ray.media.processor import load_media_processor

    assert section.model is not None
    return load_media_processor(section.model, settings, f"{section_name(section)}.model", section.revision)


def image_backend() -> str:
    """Tells what processes images here: torchvision where it can be imported, else Pillow."""
    from taid_ray.media.processor import torchvision_problem

    return "pil" if torchvision_problem() else "torchvision"


def check_run_tokenizer(config: DistillConfig, tokenizer: Any, student_config: Any) -> None:
    """Checks that the run's tokenizer will be the same in RUN/model; one with code of its own is trusted. Raises ModelError."""
    if not tokenizer_section(config).trust_remote_code:
        check_saved_tokenizer(tokenizer, student_config)


def shared_vocabulary(config: DistillConfig, teacher_config: Any, student_config: Any) -> Vocabulary:
    """Aligns the tokenizers of both models. Raises ModelError if they disagree.

    Without a teacher all rows of the student's head count: it must learn to give nothing to those that no token has.
    """
    student = config.student
    if config.teacher is None:
        rows = student_config.get_text_config().vocab_size
        check_size(load_tokenizer(student), rows, "student.model")
        return Vocabulary(rows, (), (), rows)
    teacher_tokenizer = load_tokenizer(config.teacher)
    student_tokenizer = teacher_tokenizer if student.model is None else load_tokenizer(student)
    teacher_rows, student_rows = (each.get_text_config().vocab_size for each in (teacher_config, student_config))
    check_size(teacher_tokenizer, teacher_rows, "teacher.model")
    if student.model is not None:
        check_size(student_tokenizer, student_rows, "student.model")
    return align(
        teacher_tokenizer.get_vocab(),
        student_tokenizer.get_vocab(),
        teacher_rows,
        student_rows,
        student.resize_to_teacher,
        (added_ids(teacher_tokenizer), added_ids(student_tokenizer)),
    )
