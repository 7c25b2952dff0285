"""Preflight: finds what is wrong with models and data before a cluster is touched, and what all processes must agree on."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from taid_ray.config.data import DataConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.data.dataset import TrainingData, open_validation, validation_rows
from taid_ray.data.documents import Documents
from taid_ray.data.fingerprint import Fingerprint, fingerprint, rows_digest
from taid_ray.data.images import EncoderMedia
from taid_ray.data.preview import SamplePreview, preview
from taid_ray.data.shared_ids import check_ids
from taid_ray.data.store.prepared import PreparedData
from taid_ray.errors import ConfigError
from taid_ray.media.processor import MediaProcessor
from taid_ray.models.hub import hub_names, offline_if_unreachable
from taid_ray.models.pair import (
    check_models,
    check_run_tokenizer,
    model_configs,
    run_media,
    run_tokenizer,
    shared_vocabulary,
)
from taid_ray.models.processors import check_media
from taid_ray.models.vocabulary import Vocabulary
from taid_ray.student.seeing import rows_that_show
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
    teacher = config.teacher
    if teacher and teacher.payload == "topk":
        check_topk(teacher.topk, vocabulary.num_shared)
    check_directory(config.cache)
    processor = run_media(config)
    media = encoder_media(processor)
    if teacher and teacher.mode == "cache":
        find_record(config, vocabulary.num_shared, processor.settings if processor else None)
    notes = []
    if processor is not None:
        notes = check_media(config, processor, teacher_config, student_config, vocabulary.num_shared)
    data = training_data(config, tokenizer, media)
    held_out = [open_validation(source) for source in config.data.validations]
    encodes_here = config.data.order == "blocks"  # else tasks read the training data, see driver/prepare.py
    found = documents_fingerprint(config.data, [source.documents for source in data], held_out)
    if teacher and teacher.mode == "file":
        found["outputs"] = outputs_file(config, vocabulary.num_shared).fingerprint
    checked = check_data(config.data, data, tokenizer, vocabulary.num_shared, held_out, media)
    return RunSpec(
        total_steps=config.train.steps or (steps_of_epochs(config, data[0].rows_per_epoch()) if encodes_here else 0),
        vocabulary=vocabulary,
        payload_bytes=largest_payload(config, teacher_config, vocabulary) if teacher else 0,
        data=replace(checked, notes=(*checked.notes, *notes)),
        fingerprint=found | {"rows": checked.rows_digest},
        stop_ids=tuple(dict.fromkeys(token for source in data for token in source.stop_ids())),
        media=processor.settings if processor else None,
    )


def encoder_media(processor: MediaProcessor | None) -> EncoderMedia | None:
    """Returns what an encoder needs to look at data with images, which it does not keep; None without any."""
    return None if processor is None else EncoderMedia(processor)


def training_data(config: DistillConfig, tokenizer: Any, media: EncoderMedia | None = None) -> list[TrainingData]:
    """Opens the sources of a run's training data. Raises DataError."""
    return [
        TrainingData(source, tokenizer, config.train.seed, config.train.batch_size, media)
        for source in config.data.sources
    ]


def documents_fingerprint(config: DataConfig, train: Sequence[Documents], held_out: Sequence[Documents]) -> Fingerprint:
    """Takes the fingerprint of a run's documents. Raises DataError.

    train: those of `config.sources`; they are read with `order: blocks` only, else names and sizes are all that is taken.
    held_out: those of `config.validations`.
    """
    read = config.order == "blocks"
    pairs = zip(config.validations, held_out, strict=True)
    valid = [documents if source.valid is not None else None for source, documents in pairs]
    if isinstance(config.train, str):
        return fingerprint(train[0], valid[0], read)
    common = valid[0] if config.valid is not None else None
    own = valid if common is None else [None] * len(train)
    sources = [fingerprint(documents, other, read) for documents, other in zip(train, own, strict=True)]
    return {"sources": sources, "valid": None if common is None else common.fingerprint()}


def first_samples(config: DistillConfig, count: int) -> tuple[list[str], list[SamplePreview]]:
    """Reads the first samples of each source of training data with nothing but the tokenizer, before they are mixed.

    Returns sentences that say how the data were understood, and the samples. Raises ModelError or DataError.
    """
    offline_if_unreachable(hub_names(config))
    tokenizer = run_tokenizer(config)
    lines, samples = [], []
    opened = training_data(config, tokenizer, encoder_media(run_media(config)))
    for source, data in zip(config.data.sources, opened, strict=True):
        samples += [preview(sample, tokenizer, source.label) for sample in islice(data.samples(), count)]
        lines += [*data.description(), *(f"note: {note}" for note in data.notes())]
    return lines, samples


def check_data(
    config: DataConfig,
    data: Sequence[TrainingData],
    tokenizer: Any,
    num_shared: int,
    held_out: Sequence[Documents],
    media: EncoderMedia | None = None,
) -> DataCheck:
    """Encodes the first block of each source and the validation rows, so that almost every DataError comes early.

    data: those of `config.sources`. held_out: those of `config.validations`.
    """
    tokens = tokenizer.get_vocab()
    rows = [source.first_block() for source in data]
    dropped, truncated = (sum(getattr(source.counts, name) for source in data) for name in ("dropped", "truncated"))
    pairs = [*zip(config.validations, held_out, strict=True)]
    valid_rows = [validation_rows(where, tokenizer, documents, media) for where, documents in pairs]
    for part in (*rows, *valid_rows):
        check_ids(part, num_shared, tokens)
    if media is not None:
        rows_that_show([row for part in valid_rows for row in part])
    for source, own in zip(data, rows, strict=True):
        if not own:
            next(source.batches())  # raises unless a later block has some
    said = [line for source in data for line in source.description()]
    said += [line for where, documents in pairs if where.valid is not None for line in documents.description()]
    notes = tuple(note for source in data for note in source.notes())
    sizes = (sum(map(len, rows)), dropped, truncated, sum(map(len, valid_rows)))
    return DataCheck(*sizes, said, notes, rows_digest(row for part in (*rows, *valid_rows) for row in part))


def largest_payload(config: DistillConfig, teacher_config: Any, vocabulary: Vocabulary) -> int:
    """Bytes of the teacher's answer to a micro-batch in which every position carries loss."""
    per_token = payload_bytes_per_token(config, teacher_config, vocabulary)
    return config.train.micro_batch_size * config.data.sequence_length * per_token


def with_data(config: DistillConfig, spec: RunSpec, data: PreparedData) -> RunSpec:
    """Completes the facts of a run by those of its prepared data. Raises ConfigError as `steps_of_epochs` does."""
    found, trained = spec.fingerprint or {}, [{"train": source.fingerprint} for source in data.sources]
    if isinstance(config.data.train, str):
        found = found | trained[0]
    else:
        pairs = zip(found.get("sources", trained), trained, strict=True)
        found = found | {"sources": [before | after for before, after in pairs]}
    found = found | {"index": data.digest}
    images = config.train.micro_batch_size * (data.totals.media or {}).get("largest_row_image_bytes", 0)
    steps = spec.total_steps or steps_of_epochs(config, data.rows)
    return replace(spec, total_steps=steps, fingerprint=found, image_bytes=images)


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
