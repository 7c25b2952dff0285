"""Everything that can be found wrong with models and data before a cluster is touched; what is learnt becomes the plan."""

import sys
from dataclasses import dataclass
from typing import Any

from taid_ray.config import DistillConfig
from taid_ray.data import TrainingData, check_data
from taid_ray.errors import ConfigError
from taid_ray.models import load_model_config, load_tokenizer
from taid_ray.student_model import student_model_config
from taid_ray.vocabulary import Vocabulary, align, check_ids


@dataclass(frozen=True)
class Plan:
    """What every process of the run has to agree on."""

    total_steps: int
    vocabulary: Vocabulary
    resize_rows: int | None
    """Rows the student's embedding is resized to, or None."""


@dataclass(frozen=True)
class Job:
    """What the driver hands to every student worker."""

    config: DistillConfig
    plan: Plan
    device: str
    """cpu or cuda."""
    scheduler: Any
    """Handle of the TAID scheduler actor."""
    pool: str
    """Name of the teacher pool's Serve application (unused with a local teacher)."""


def prepare(config: DistillConfig) -> Plan:
    """Checks teacher, student and data against each other. Downloads from the hub what is not there yet.

    Raises ConfigError, ModelError or DataError.
    """
    teacher_config = load_model_config(
        config.teacher.model,
        revision=config.teacher.revision,
        trust_remote_code=config.teacher.trust_remote_code,
        key="teacher.model",
    )
    student_config = student_model_config(config)
    length, longest = config.data.sequence_length, context_length(teacher_config, student_config)
    if length > longest:
        raise ConfigError(
            f"data.sequence_length: {length} is longer than the context of teacher or student; "
            f"set it to at most {longest}"
        )
    tokenizer = run_tokenizer(config)
    vocabulary = shared_vocabulary(config, teacher_config, student_config)
    check_data(config.data, tokenizer)
    data = TrainingData(config.data, tokenizer, config.train.seed, config.train.batch_size)
    check_ids(data.first_block(), vocabulary.num_shared, tokenizer.get_vocab())
    rows = student_config.get_text_config().vocab_size
    return Plan(
        total_steps=config.train.steps or steps_of_epochs(config, data),
        vocabulary=vocabulary,
        resize_rows=vocabulary.student_rows if vocabulary.student_rows > rows else None,
    )


def context_length(*model_configs: Any) -> int:
    """The longest row that every one of these models holds; unbounded where a config names no limit."""
    texts = [model_config.get_text_config() for model_config in model_configs]
    return min(getattr(text, "max_position_embeddings", None) or sys.maxsize for text in texts)


def run_tokenizer(config: DistillConfig) -> Any:
    """The tokenizer of data and of RUN/model: the student's own, or the teacher's where the student has none."""
    student, teacher = config.student, config.teacher
    if student.model is None or student.resize_to_teacher:
        return load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code, key="teacher.model")
    return load_tokenizer(student.model, student.revision, student.trust_remote_code, key="student.model")


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


def steps_of_epochs(config: DistillConfig, data: TrainingData) -> int:
    """Optimizer steps of `train.epochs` passes; whole global batches only, at least one."""
    assert config.train.epochs is not None
    return max(1, int(config.train.epochs * data.rows_per_epoch() / config.train.batch_size))
