"""Preflight: finds what is wrong with models and data before a cluster is touched, and what all processes must agree on."""

from dataclasses import replace
from itertools import islice
from typing import Any

from taid_ray.config.data import DataConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.data.dataset import TrainingData, open_validation, validation_rows
from taid_ray.data.documents import Documents
from taid_ray.data.fingerprint import fingerprint, rows_digest
from taid_ray.data.preview import SamplePreview, preview
from taid_ray.data.shared_ids import check_ids
from taid_ray.data.store.prepared import PreparedData
from taid_ray.errors import ConfigError
from taid_ray.models.hub import offline_if_unreachable
from taid_ray.models.pair import check_models, check_run_tokenizer, model_configs, run_tokenizer, shared_vocabulary
from taid_ray.models.vocabulary import Vocabulary
from taid_ray.student.spec import DataCheck, RunSpec
from taid_ray.teacher.cache.offline import find_record
from taid_ray.teacher.cache.outputs_file import outputs_file
from taid_ray.teacher.cache.store import check_directory
from taid_ray.teacher.payload import check_topk, payload_bytes_per_token


def prepare(config: DistillConfig) -> RunSpec:
    """Checks teacher, student and data against each other. Downloads from the hub what is not there yet.

    Raises ConfigError, ModelError or DataError.
    """
    teacher_config, student_config = model_configs(config)
    check_models(config, teacher_config, student_config)
    tokenizer = run_tokenizer(config)
    check_run_tokenizer(config, tokenizer, student_config)
    vocabulary = shared_vocabulary(config, teacher_config, student_config)
    if config.teacher.payload == "topk":
        check_topk(config.teacher.topk, vocabulary.num_shared)
    check_directory(config.cache)
    if config.teacher.mode == "cache":
        find_record(config, vocabulary.num_shared)
    data = training_data(config, tokenizer)
    held_out = open_validation(config.data)
    encodes_here = config.data.order == "blocks"  # else tasks read the training data, see driver/prepare.py
    found = fingerprint(data.documents, held_out if config.data.valid is not None else None, encodes_here)
    if config.teacher.mode == "file":
        found["outputs"] = outputs_file(config, vocabulary.num_shared).fingerprint
    checked = check_data(config.data, data, tokenizer, vocabulary.num_shared, held_out)
    return RunSpec(
        total_steps=config.train.steps or (steps_of_epochs(config, data.rows_per_epoch()) if encodes_here else 0),
        vocabulary=vocabulary,
        payload_bytes=largest_payload(config, teacher_config, vocabulary),
        data=checked,
        fingerprint=found | {"rows": checked.rows_digest},
        stop_ids=tuple(data.stop_ids()),
    )


def training_data(config: DistillConfig, tokenizer: Any) -> TrainingData:
    """Opens the data of a run. Raises DataError."""
    return TrainingData(config.data, tokenizer, config.train.seed, config.train.batch_size)


def first_samples(config: DistillConfig, count: int) -> tuple[list[str], list[SamplePreview]]:
    """Reads the first samples of the training data with nothing but the tokenizer, before they are shuffled and packed.

    Returns sentences that say how the data were understood, and the samples. Raises ModelError or DataError.
    """
    offline_if_unreachable([config.teacher.model, config.student.model, config.data.train, config.data.valid])
    tokenizer = run_tokenizer(config)
    data = training_data(config, tokenizer)
    samples = [preview(sample, tokenizer) for sample in islice(data.samples(), count)]
    return [*data.description(), *(f"note: {note}" for note in data.notes())], samples


def check_data(
    config: DataConfig, data: TrainingData, tokenizer: Any, num_shared: int, held_out: Documents | None = None
) -> DataCheck:
    """Encodes the first block and the validation rows, so that almost every DataError comes early.

    held_out: the documents of validation, where they are open already.
    """
    tokens = tokenizer.get_vocab()
    rows = data.first_block()
    dropped, truncated = data.counts.dropped, data.counts.truncated
    check_ids(rows, num_shared, tokens)
    valid_rows = validation_rows(config, tokenizer, held_out)
    check_ids(valid_rows, num_shared, tokens)
    if not rows:
        next(data.batches())  # raises unless a later block has some
    said = data.description() + (held_out.description() if held_out and config.valid is not None else [])
    digest = rows_digest([*rows, *valid_rows])
    return DataCheck(len(rows), dropped, truncated, len(valid_rows), said, tuple(data.notes()), digest)


def largest_payload(config: DistillConfig, teacher_config: Any, vocabulary: Vocabulary) -> int:
    """Bytes of the teacher's answer to a micro-batch in which every position carries loss."""
    per_token = payload_bytes_per_token(config, teacher_config, vocabulary)
    return config.train.micro_batch_size * config.data.sequence_length * per_token


def with_data(config: DistillConfig, spec: RunSpec, data: PreparedData) -> RunSpec:
    """Completes the facts of a run by those of its prepared data. Raises ConfigError as `steps_of_epochs` does."""
    found = (spec.fingerprint or {}) | {"train": data.fingerprint, "index": data.totals.digest}
    return replace(spec, total_steps=spec.total_steps or steps_of_epochs(config, data.rows), fingerprint=found)


def steps_of_epochs(config: DistillConfig, rows: int) -> int:
    """Optimizer steps of `train.epochs` passes over `rows` rows; whole global batches only, at least one.

    Raises ConfigError if the warm-up is longer.
    """
    train = config.train
    assert train.epochs is not None
    steps = max(1, int(train.epochs * rows / train.batch_size))
    if train.warmup_steps > steps:
        raise ConfigError(
            f"train.warmup_steps = {train.warmup_steps} exceeds the {steps} steps of train.epochs = {train.epochs:g}; "
            "set fewer warm-up steps or more epochs"
        )
    return steps
