"""Everything that can be found wrong with models and data before a cluster is touched; what is learnt becomes the plan."""

import sys
from dataclasses import dataclass
from typing import Any

from taid_ray.cache import check_directory
from taid_ray.config import DataConfig, DistillConfig
from taid_ray.data import TrainingData, validation_rows
from taid_ray.errors import ConfigError
from taid_ray.hub import offline_if_unreachable
from taid_ray.models import check_causal_lm, check_divisible, check_weights, load_model_config, load_tokenizer
from taid_ray.payload import bytes_per_token, check_topk
from taid_ray.schedule import adaptive_is_linear, sigmoid
from taid_ray.student_model import check_student, has_teacher_tokenizer, student_model_config
from taid_ray.vocabulary import Vocabulary, align, check_ids
from taid_ray.warmed import find_warmed


@dataclass(frozen=True)
class DataCheck:
    """What became of the first block of training documents, and of the validation documents."""

    rows: int
    dropped: int
    """Documents of the first block that gave no row (see `encoding.Counts`)."""
    truncated: int
    """Documents of the first block that were shortened."""
    valid_rows: int


@dataclass(frozen=True)
class Plan:
    """What every process of the run has to agree on."""

    total_steps: int
    vocabulary: Vocabulary
    payload_bytes: int
    """Of one request to the teacher, at most."""
    data: DataCheck


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
    checkpoints: str
    """Where this run's checkpoints are: a directory or a URI."""
    restarts: int = 0
    """Attempts before this one."""


def prepare(config: DistillConfig) -> Plan:
    """Checks teacher, student and data against each other. Downloads from the hub what is not there yet.

    Raises ConfigError, ModelError or DataError.
    """
    teacher_config, student_config = model_configs(config)
    check_models(config, teacher_config, student_config)
    tokenizer = run_tokenizer(config)
    vocabulary = shared_vocabulary(config, teacher_config, student_config)
    if config.teacher.payload == "topk":
        check_topk(config.teacher.topk, vocabulary.num_shared)
    check_directory(config.cache)
    if config.teacher.mode == "cache":
        find_warmed(config, vocabulary.num_shared)
    data = TrainingData(config.data, tokenizer, config.train.seed, config.train.batch_size)
    checked = check_data(config.data, data, tokenizer, vocabulary.num_shared)
    return Plan(
        total_steps=config.train.steps or steps_of_epochs(config, data),
        vocabulary=vocabulary,
        payload_bytes=largest_payload(config, teacher_config, vocabulary),
        data=checked,
    )


def notes(config: DistillConfig, plan: Plan) -> list[str]:
    """What is allowed, but perhaps not meant: documents lost, and a schedule whose adaptive part does nothing."""
    found, schedule = [], config.schedule
    if plan.data.dropped or plan.data.truncated:
        found.append(
            f"of the first {config.data.block_documents} documents, {plan.data.dropped} are left out (empty, too long, or "
            f"nothing left of the response) and {plan.data.truncated} are cut short (data.overlong: {config.data.overlong}); "
            "a larger data.sequence_length keeps more"
        )
    t_start, t_end, steps = schedule.t_start, schedule.t_end, plan.total_steps
    adaptive = config.loss.name == "taid" and schedule.mode in ("adaptive", "normalised") and t_start < t_end
    gain = schedule.gain if schedule.mode == "normalised" else 0.0
    if adaptive and adaptive_is_linear(t_start, t_end, schedule.alpha, steps, gain):
        enough = (t_end - t_start) / ((1 - t_start) * steps * sigmoid(gain))
        found.append(
            f"with schedule.alpha {schedule.alpha:g} and {steps} steps, {schedule.mode} t stays on its linear floor; "
            f"from about {enough:.2g} on it can leave it"
        )
    return found


def check_data(config: DataConfig, data: TrainingData, tokenizer: Any, num_shared: int) -> DataCheck:
    """Encodes the first block and the validation rows, so that almost every DataError comes early."""
    tokens = tokenizer.get_vocab()
    rows = data.first_block()
    dropped, truncated = data.counts.dropped, data.counts.truncated
    check_ids(rows, num_shared, tokens)
    valid_rows = validation_rows(config, tokenizer)
    check_ids(valid_rows, num_shared, tokens)
    if not rows:
        next(data.batches())  # raises unless a later block has some
    return DataCheck(len(rows), dropped, truncated, len(valid_rows))


def largest_payload(config: DistillConfig, teacher_config: Any, vocabulary: Vocabulary) -> int:
    """Bytes of the teacher's answer to a micro-batch in which every position carries loss."""
    per_token = payload_bytes_per_token(config, teacher_config, vocabulary)
    return config.train.micro_batch_size * config.data.sequence_length * per_token


def payload_bytes_per_token(config: DistillConfig, teacher_config: Any, vocabulary: Vocabulary) -> int:
    """Bytes of the teacher's answer for one loss position."""
    text, teacher = teacher_config.get_text_config(), config.teacher
    kept = teacher.dtype if teacher.dtype != "auto" else str(text.dtype).removeprefix("torch.")
    itemsize = 2 if kept in ("bfloat16", "float16") else 4
    return bytes_per_token(teacher.payload, text.hidden_size, vocabulary.num_shared, teacher.topk, itemsize)


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


def steps_of_epochs(config: DistillConfig, data: TrainingData) -> int:
    """Optimizer steps of `train.epochs` passes; whole global batches only, at least one.

    Raises ConfigError if the warm-up is longer.
    """
    train = config.train
    assert train.epochs is not None
    steps = max(1, int(train.epochs * data.rows_per_epoch() / train.batch_size))
    if train.warmup_steps > steps:
        raise ConfigError(
            f"train.warmup_steps = {train.warmup_steps} exceeds the {steps} steps of train.epochs = {train.epochs:g}; "
            "set fewer warm-up steps or more epochs"
        )
    return steps
