"""`taid-ray cache export`: the teacher's outputs for all of a configuration's data, from the cache into one parquet file."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import DistillConfig
from taid_ray.driver.asked_rows import AskedRows, prepared_rows
from taid_ray.driver.cache_fill import cached_teacher, connected, fill_config
from taid_ray.driver.outputs_import import data_samples
from taid_ray.driver.preflight import prepare
from taid_ray.driver.progress import ProgressView
from taid_ray.errors import ConfigError, TeacherError
from taid_ray.models.hub import restoring_hub_mode
from taid_ray.run.directory import on_its_day
from taid_ray.teacher.cache.offline import WARM, TeacherRecord, find_record
from taid_ray.teacher.cache.outputs import OutputsWriter, SampleOutputs
from taid_ray.teacher.cache.samples import KeyedSample
from taid_ray.teacher.cache.store import CacheStore


@dataclass(frozen=True)
class ExportResult:
    """Result of `export_cache`."""

    samples: int
    positions: int
    """Loss positions of all samples."""
    bytes: int
    """Size of the file."""
    record: TeacherRecord
    """The teacher whose outputs they are."""


def export_cache(config: DistillConfig, path: Path) -> ExportResult:
    """Writes what `fill_cache` left for a configuration into a parquet file, one row per sample; see `outputs` for its form.

    Memory does not depend on the size of the data, which are prepared on Ray as a run does it. Raises ConfigError if the
    outputs are not of payload topk, if there is such a file already, and if samples are missing in the cache; RunError if the
    file cannot be written.
    """
    config = _offline(config)
    if path.exists() or not path.absolute().parent.is_dir():
        why = "exists already" if path.exists() else "is in a directory that does not exist"
        raise ConfigError(f"{path} {why}; name a new file for the outputs")
    with restoring_hub_mode(), ProgressView() as view:
        view.say("checking models and data")
        spec = prepare(config)
        _, record = find_record(config, spec.vocabulary.num_shared)
        writer = OutputsWriter(path, record)
        try:
            with connected(config, view):
                samples, positions = _write_all(prepared_rows(config, spec, view), record, writer, view)
            return ExportResult(samples, positions, writer.finish(), record)
        finally:
            writer.discard()


def _offline(config: DistillConfig) -> DistillConfig:
    """The configuration as a run without a teacher has it. Raises ConfigError if its outputs cannot be exported."""
    payload = cached_teacher(config).payload
    if payload != "topk":
        raise ConfigError(
            f"teacher.payload: {payload} cannot be exported, because a file holds the likeliest ids of every position; give "
            "teacher.payload=topk to `taid-ray cache warm`, and to this command"
        )
    if config.data.has_images:
        raise ConfigError(
            "data.images_column: outputs of a teacher that is shown images cannot be exported, because the file has samples of "
            "text only; keep them in cache.directory, and set teacher.mode: cache"
        )
    config = on_its_day(fill_config(with_absolute_paths(config)))
    return config.model_copy(update={"teacher": config.given_teacher.model_copy(update={"mode": "cache"})})


def _write_all(rows: AskedRows, record: TeacherRecord, writer: OutputsWriter, view: ProgressView) -> tuple[int, int]:
    """Writes every sample; returns their number and that of their loss positions. Raises ConfigError if any are missing."""
    config = rows.config
    store = CacheStore(config.cache, view.say)
    samples = positions = missing = 0
    for sample, document, split in data_samples(rows, record.info.fingerprint):
        found = _outputs(sample, store, record)
        samples, positions = samples + 1, positions + sample.num_positions
        if found is None:
            missing += 1
        elif not missing:
            writer.write(SampleOutputs(sample.tokens, sample.loss_positions, found, document, split))
        view.wait_for(f"exported {samples:,} samples")
    if missing:
        raise ConfigError(
            f"cache.directory: {config.cache.directory} lacks the outputs of {missing:,} of the data's {samples:,} samples; "
            f"{WARM}, and export again"
        )
    return samples, positions


def _outputs(sample: KeyedSample, store: CacheStore, record: TeacherRecord) -> dict[str, Tensor] | None:
    """Reads a sample's outputs from the cache; None if they are not there, or cannot be this teacher's."""
    tensors = store.get(sample.key)
    try:
        if tensors is not None:
            record.info.check_output(tensors, sample.num_positions)
    except TeacherError:
        return None
    return tensors
