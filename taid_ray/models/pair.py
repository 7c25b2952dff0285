"""Checks that teacher and student fit each other and the data; their tokenizer; their shared vocabulary."""

from typing import Any

from taid_ray.config.schema import DistillConfig
from taid_ray.models.hub import offline_if_unreachable
from taid_ray.models.lengths import check_lengths
from taid_ray.models.loading import (
    check_attention,
    check_causal_lm,
    check_divisible,
    check_weights,
    load_model_config,
    load_tokenizer,
)
from taid_ray.models.saving import check_architecture
from taid_ray.models.student_init import check_student, has_teacher_tokenizer, student_model_config
from taid_ray.models.tokenizer import added_ids, check_saved_tokenizer, check_size
from taid_ray.models.vocabulary import Vocabulary, align


def model_configs(config: DistillConfig) -> tuple[Any, Any]:
    """Loads the transformers configs of teacher and student. Raises ConfigError or ModelError."""
    offline_if_unreachable([config.teacher.model, config.student.model, *config.data.names])
    return load_model_config(config.teacher), student_model_config(config)


def check_models(config: DistillConfig, teacher_config: Any, student_config: Any) -> None:
    """Checks what can be known about both models without loading weights. Raises ConfigError or ModelError."""
    teacher, student = config.teacher, config.student
    check_causal_lm(teacher_config, "teacher.model")
    check_divisible(teacher_config, teacher.shards)
    if not teacher.is_stored or student.init == "cut":
        check_weights(teacher)
    if not teacher.is_stored:
        check_attention(teacher, teacher_config)
    if student.model is not None:
        check_causal_lm(student_config, "student.model")
        if student.init == "pretrained":
            check_weights(student)
    check_attention(student, student_config)
    check_student(config, student_config)
    check_architecture(config, student_config)
    check_lengths(config, teacher_config, student_config)


def run_tokenizer(config: DistillConfig) -> Any:
    """The tokenizer of data and of RUN/model: the student's own, or the teacher's where the student has none."""
    return load_tokenizer(config.teacher if has_teacher_tokenizer(config) else config.student)


def check_run_tokenizer(config: DistillConfig, tokenizer: Any, student_config: Any) -> None:
    """Checks that the run's tokenizer will be the same in RUN/model; one with code of its own is trusted. Raises ModelError."""
    if not (config.teacher if has_teacher_tokenizer(config) else config.student).trust_remote_code:
        check_saved_tokenizer(tokenizer, student_config)


def shared_vocabulary(config: DistillConfig, teacher_config: Any, student_config: Any) -> Vocabulary:
    """Aligns the tokenizers of both models. Raises ModelError if they disagree."""
    student = config.student
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
