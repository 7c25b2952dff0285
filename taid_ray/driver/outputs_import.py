"""teacher.mode: file: copies the outputs that a run needs from the file into the cache, where the workers find them."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

from taid_ray.config.schema import DistillConfig
from taid_ray.driver.asked_rows import AskedRows
from taid_ray.driver.cache_fill import check_fits
from taid_ray.driver.progress import ProgressView
from taid_ray.errors import ConfigError, DataError, RunError
from taid_ray.losses.projection import LogitTransform
from taid_ray.student.spec import RunSpec
from taid_ray.teacher.cache.nearest import describe_nearest
from taid_ray.teacher.cache.offline import TeacherRecord, file_record, write_record
from taid_ray.teacher.cache.outputs_file import OutputsFile, outputs_file
from taid_ray.teacher.cache.samples import KeyedSample, samples_of_row, topk_key
from taid_ray.teacher.cache.store import CacheStore
from taid_ray.teacher.payload import bytes_per_token
from taid_ray.teacher.protocol import TeacherInfo

SHOWN_TOKENS = 8


def import_outputs(rows: AskedRows, view: ProgressView) -> None:
    """Copies the outputs of every sample a run may ask for from teacher.outputs into cache.directory, and their record.

    Those that are there already stay. Raises DataError for a bad row of the file, and if it holds no outputs for a sample of
    the data; ConfigError if the cache is too small; RunError if it cannot be written.
    """
    config, spec = rows.config, rows.spec
    file = outputs_file(config, spec.vocabulary.num_shared)
    fingerprint = str((spec.fingerprint or {})["outputs"])
    store = CacheStore(config.cache, view.say)
    view.wait_for("looking which outputs of teacher.outputs are in the cache")
    check_fits(rows)
    missing, samples = set(), 0
    for sample, _, _ in data_samples(rows, fingerprint):
        samples += 1
        if not store.has(sample.key):
            missing.add(sample.key)
    if not missing and _is_recorded(config, fingerprint):
        return
    view.say(f"copying the outputs of {len(missing):,} samples from {file.path} into {config.cache.directory}")
    error = _copy(file, fingerprint, missing, store, view)
    if missing:
        raise _not_held(rows, file, missing, samples)
    if file.labels_outside:
        view.say(
            f"note: teacher.outputs has no label_log_probs; {file.labels_outside:,} labels are not among the ids of their "
            "positions, and validation takes the teacher's cross-entropy there as if all other ids were equally likely"
        )
    write_record(str(config.cache.directory), _record(file, fingerprint, config, spec, error))


def data_samples(rows: AskedRows, fingerprint: str) -> Iterator[tuple[KeyedSample, int, str]]:
    """Yields every sample a run may ask for, with the number and the split of its document. Raises as `AskedRows`."""
    for number, row in enumerate(rows):
        split = "valid" if number < rows.spec.data.valid_rows else "train"
        for sample, document in samples_of_row(row, fingerprint):
            yield sample, document, split


def _copy(file: OutputsFile, fingerprint: str, missing: set[str], store: CacheStore, view: ProgressView) -> float:
    """Copies the missing samples and takes them out of `missing`. Reads, and so checks, the whole file.

    Returns the mean probability outside the top-k in the file. Raises RunError if the cache does not take a sample.
    """
    outside, positions = 0.0, 0
    for number, sample in enumerate(file.samples(), 1):
        key, tail = topk_key(fingerprint, sample.tokens, sample.loss_positions), sample.tensors["log_tail"]
        outside, positions = outside + float(tail.double().exp().sum()), positions + len(tail)
        if key in missing:
            missing.remove(key)
            store.put(key, sample.tensors)
            if not store.has(key):
                raise RunError(
                    "teacher.mode: file: cache.directory does not take the outputs of teacher.outputs; look after its disk, "
                    "raise cache.disk_gib, and give the same command again"
                )
        view.wait_for(f"copying teacher.outputs: {number:,} of {file.num_rows:,} rows")
    return outside / max(1, positions)


def _is_recorded(config: DistillConfig, fingerprint: str) -> bool:
    try:
        file_record(config, fingerprint)
    except ConfigError:
        return False
    return True


def _record(
    file: OutputsFile, fingerprint: str, config: DistillConfig, spec: RunSpec, payload_error: float
) -> TeacherRecord:
    """The record of a teacher that is only a file: what `taid-ray cache export` knew of it, or what the file shows."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    settings, k, num_shared = f"file {file.path}", config.given_teacher.topk, spec.vocabulary.num_shared
    if file.teacher is not None:
        info = replace(file.teacher.info, fingerprint=fingerprint, payload="topk", topk=k, num_shared=num_shared)
        return replace(file.teacher, info=info, settings=settings, model=file.path, at=now)
    info = TeacherInfo(
        fingerprint=fingerprint,
        probe_digest="",
        head_digest="",
        dtype="float32",
        hidden_size=0,
        num_parameters=0,
        vocab_rows=num_shared,
        num_shared=num_shared,
        payload="topk",
        topk=k,
        bytes_per_token=bytes_per_token("topk", 0, num_shared, k, 4),
        transform=LogitTransform(),
        has_bias=False,
        dropped_mass=0.0,
        packing_error=None,
    )
    return TeacherRecord(info, settings, file.path, None, {}, payload_error, now)


def _not_held(rows: AskedRows, file: OutputsFile, missing: set[str], samples: int) -> DataError:
    """The error for samples that the file does not hold: how many, the first of them, and what differs."""
    fingerprint = str((rows.spec.fingerprint or {})["outputs"])
    sample, document, split = next(found for found in data_samples(rows, fingerprint) if found[0].key in missing)
    tokens = sample.tokens
    shown = ", ".join(map(str, tokens[:SHOWN_TOKENS])) + (", ..." if len(tokens) > SHOWN_TOKENS else "")
    key = "data.valid" if split == "valid" and rows.config.data.valid is not None else "data.train"
    return DataError(
        f"teacher.outputs: {file.path} has no outputs for {len(missing):,} of the {samples:,} samples of the data. The first of "
        f"them is of document {document} of {key}, of {len(tokens)} tokens: {shown}. In the file, "
        f"{describe_nearest(file.tokens(), tokens, sample.loss_positions)}. Make the file of these tokens, or give the data and "
        "the keys with which it was made"
    )
