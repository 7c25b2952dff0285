"""Teacher and student together: whether they fit each other and the data, their tokenizer, their shared vocabulary."""

import sys
from typing import Any

from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ConfigError
from taid_ray.models.hub import offline_if_unreachable
from taid_ray.models.loading import check_causal_lm, check_divisible, check_weights, load_model_config, load_tokenizer
from taid_ray.models.student_init import check_student, has_teacher_tokenizer, student_model_config
from taid_ray.models.vocabulary import Vocabulary, align


def model_configs(config: DistillConfig) -> tuple[Any, Any]:
    """The transformers configs of teacher and student."""
    teacher = config.teacher
    offline_if_unreachable([teacher.model, config.student.model, config.data.train, config.data.valid])
    return (
        load_model_config(teacher.model, teacher.revision, teacher.trust_remote_code, key="teacher.model"),
        student_model_config(config),
    )


def check_models(config: DistillConfig, teacher_config: Any, student_config: Any) -> None:
    """Checks what can be known about both models without loading weights. Raises ConfigError or ModelError."""
    teacher, student = config.teacher, config.student
    check_causal_lm(teacher_config, "teacher.model")
    check_divisible(teacher_config, teacher.shards, "teacher.model")
    if teacher.mode != "cache" or student.init == "cut":
        check_weights(teacher.model, "teacher.model")
    if student.model is not None:
        check_causal_lm(student_config, "student.model")
        if student.init == "pretrained":
            check_weights(student.model, "student.model")
    check_student(config, student_config)
    length = config.data.sequence_length
    for name, longest in (("teacher", context_length(teacher_config)), ("student", context_length(student_config))):
        if length > longest:
            raise ConfigError(
                f"data.sequence_length: {length} is longer than the {name}'s context of {longest} tokens; "
                f"set it to at most {context_length(teacher_config, student_config)}"
            )


def context_length(*model_configs: Any) -> int:
    """The longest row that every one of these models holds; unbounded where a config names no limit."""
    texts = [model_config.get_text_config() for model_config in model_configs]
    return min(getattr(text, "max_position_embeddings", None) or sys.maxsize for text in texts)


def run_tokenizer(config: DistillConfig) -> Any:
    """The tokenizer of data and of RUN/model: the student's own, or the teacher's where the student has none."""
    source, key = (config.teacher, "teacher") if has_teacher_tokenizer(config) else (config.student, "student")
    return load_tokenizer(str(source.model), source.revision, source.trust_remote_code, key=f"{key}.model")


def shared_vocabulary(config: DistillConfig, teacher_config: Any, student_config: Any) -> Vocabulary:
    """Aligns the tokenizers of both models. Raises ModelError if they disagree."""
    student, teacher = config.student, config.teacher
    teacher_tokens = load_tokenizer(
        teacher.model, teacher.revision, teacher.trust_remote_code, key="teacher.model"
    ).get_vocab()
    student_tokens = teacher_tokens
    if student.model is not None:
        student_tokens = load_tokenizer(
            student.model, student.revision, student.trust_remote_code, key="student.model"
        ).get_vocab()
    return align(
        teacher_tokens,
        student_tokens,
        teacher_config.get_text_config().vocab_size,
        student_config.get_text_config().vocab_size,
        student.resize_to_teacher,
    )
