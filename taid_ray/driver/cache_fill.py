"""Computes the teacher's outputs for all of a configuration's data, so that runs on them need no teacher."""

import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch

from taid_ray.config.models import TeacherConfig
from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import Row, collate
from taid_ray.data.dataset import START, validation_rows
from taid_ray.data.run_images import RunImages
from taid_ray.distributed.capacity import check_capacity, demand_of
from taid_ray.distributed.cluster import cluster_has_gpus, ray_cluster
from taid_ray.distributed.device import resolve, torch_device
from taid_ray.driver.asked_rows import AskedRows, needs_preparing, prepared_rows
from taid_ray.driver.preflight import prepare
from taid_ray.driver.progress import ProgressView
from taid_ray.errors import ConfigError
from taid_ray.models.hub import restoring_hub_mode
from taid_ray.models.pair import model_configs, run_media, run_tokenizer
from taid_ray.names import POOL_PREFIX
from taid_ray.run.directory import on_its_day
from taid_ray.student.clock import PhaseClock
from taid_ray.student.prefetch import Prefetcher, StepBatches, read_ahead
from taid_ray.student.seeing import seeing_batches, seeing_note, teacher_seeing
from taid_ray.student.spec import RunSpec
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.cache.claims import NoClaims
from taid_ray.teacher.cache.files import BLOCK
from taid_ray.teacher.cache.offline import save_record
from taid_ray.teacher.cache.store import FULL, CacheStore
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.payload import payload_bytes_per_token
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.pool.deployment import PoolSpec
from taid_ray.teacher.pool.lifecycle import start_pool, stop_pool
from taid_ray.teacher.protocol import TeacherClient

HEADER_BYTES = 512
"""Most bytes that a file of the cache has beside its tensors."""
REQUESTS_PER_REPLICA = 2
"""Requests under way, so that no replica waits for its next one."""


@dataclass(frozen=True)
class FillResult:
    """Result of `fill_cache`."""

    directory: str
    rows: int
    found: int
    """Samples whose outputs were in the cache already."""
    computed: int
    """Samples whose outputs were computed."""
    teacher_tokens: int


def fill_cache(config: DistillConfig) -> FillResult:
    """Fills `config.cache.directory` with the teacher's outputs for the validation rows and every training sample.

    Training samples are those of one epoch, or of the run's steps if the data are a stream. Joins Ray or starts it, to prepare
    the data as a run does, and a teacher pool on it; with teacher.mode: local and data.order: blocks neither. Outputs that are
    in the cache already are verified and not computed again. Raises ConfigError, before the teacher is started, if the outputs
    do not fit into cache.disk_gib.
    """
    config = on_its_day(fill_config(with_absolute_paths(config)))
    with restoring_hub_mode(), ProgressView() as view:
        view.say("checking models and data")
        spec = prepare(config)
        images = run_images(config, spec)
        with connected(config, view):
            rows = prepared_rows(config, spec, view, images.encoder_media if images else None)
            view.wait_for("counting what the teacher will be asked")
            total = check_fits(rows)
            with running_teacher(config, spec, view, images) as inner:
                return _fill(rows, total, inner, images, view)


def run_images(config: DistillConfig, spec: RunSpec) -> RunImages | None:
    """Loads what a run's images need in this process; None in a run without images. Raises ModelError."""
    processor = run_media(config, spec.media.backend) if spec.media else None
    return None if processor is None else RunImages(processor)


@contextmanager
def connected(config: DistillConfig, view: ProgressView) -> Iterator[None]:
    """Joins Ray or starts it, if the data are prepared on it or the teacher runs there."""
    if not needs_preparing(config) and not config.has_pool:
        yield
        return
    view.say("connecting to Ray" if os.environ.get("RAY_ADDRESS") else "starting Ray here")
    with ray_cluster():
        yield


def _fill(
    rows: AskedRows, total: int, inner: TeacherClient, images: RunImages | None, view: ProgressView
) -> FillResult:
    """Asks for all rows, `total` of them, and records which teacher answered."""
    config = rows.config
    seeing = None if images is None else _seeing(rows, inner, images, view)
    teacher = CachedTeacher(inner, CacheStore(config.cache, view.say), NoClaims(), torch.device("cpu"))
    try:
        request_rows(config, teacher, iter(rows), total, view)
        first = validation_rows(config.data.validations[0], run_tokenizer(config), media=rows.media)
        held_out = collate(first[: config.train.micro_batch_size])
        save_record(config, inner, inner.payload_error(held_out), seeing, rows.spec.media)
        return FillResult(
            str(config.cache.directory), total, teacher.samples_found, teacher.samples_asked, teacher.tokens
        )
    finally:
        teacher.close()


def _seeing(rows: AskedRows, teacher: TeacherClient, images: RunImages, view: ProgressView) -> list[float]:
    """Measures whether the teacher sees, before it is asked for all rows. Raises TeacherError if not, see `teacher_seeing`."""
    least = rows.config.data.sees_at_least
    size, grey = rows.config.train.micro_batch_size, images.processor.grey
    found = teacher_seeing(teacher, seeing_batches([*rows.held_out()], size, grey, images.memory), least)
    view.say(seeing_note("teacher", found, least))
    return found


def fill_config(config: DistillConfig) -> DistillConfig:
    """The configuration with a teacher pool in place of teacher.mode: cache. Raises ConfigError if it has no cache,
    or no teacher but a file."""
    teacher = cached_teacher(config)
    if config.cache.directory is None:
        raise ConfigError(
            "cache.directory is not set: name the directory to keep the teacher's outputs in, for example "
            "cache.directory=cache"
        )
    if teacher.mode == "file":
        raise ConfigError(
            "teacher.mode: file has all outputs in teacher.outputs already; set teacher.mode to pool or local"
        )
    mode = "pool" if teacher.mode == "cache" else teacher.mode
    return config.model_copy(update={"teacher": teacher.model_copy(update={"mode": mode})})


def cached_teacher(config: DistillConfig) -> TeacherConfig:
    """The teacher whose outputs a cache keeps. Raises ConfigError if there is none."""
    if config.teacher is None:
        raise ConfigError("teacher is null, and a cache keeps the outputs of one; name it as teacher.model")
    return config.teacher


def check_fits(rows: AskedRows) -> int:
    """Counts the rows. Raises ConfigError if the cache is too small for the outputs of all of them."""
    config, amount = rows.config, rows.amount()
    per_token = payload_bytes_per_token(config, model_configs(config)[0], rows.spec.vocabulary)
    needed = (amount.loss_tokens * per_token + amount.samples * (BLOCK + HEADER_BYTES)) / FULL / 2**30
    if needed > config.cache.disk_gib:
        enough = math.ceil(needed * 1000) / 1000 if needed < 10 else math.ceil(needed)
        raise ConfigError(
            f"cache.disk_gib: {config.cache.disk_gib:g} is too small for the teacher's outputs for all data: "
            f"{amount.loss_tokens:,} loss "
            f"positions of {per_token:,} bytes (teacher.payload: {config.given_teacher.payload}) need {enough:g} GiB; set "
            f"cache.disk_gib={enough:g}, or choose a smaller teacher.payload"
        )
    return amount.rows


@contextmanager
def running_teacher(
    config: DistillConfig, spec: RunSpec, view: ProgressView, images: RunImages | None
) -> Iterator[TeacherClient]:
    """Loads the teacher into this process, or starts a pool for it on the connected cluster, which is removed at the end."""
    num_shared, read = spec.vocabulary.num_shared, images.read if images else None
    if config.given_teacher.mode == "local":
        view.say("loading the teacher")
        device = torch_device(resolve(config.device, torch.cuda.is_available()))
        yield LocalTeacher(config.given_teacher, num_shared, device, spec.media, read)
        return
    kind = resolve(config.device, cluster_has_gpus())
    demand = replace(demand_of(config, kind), workers=0, max_workers=0)
    check_capacity(demand)
    name = f"{POOL_PREFIX}warm-{uuid.uuid4().hex[:8]}"
    view.say(f"starting the teacher pool: {demand.replicas} replica(s) x {demand.shards} shard(s)")
    try:
        pool = PoolSpec(config.given_teacher, num_shared, kind, demand.teacher_role, media=spec.media)
        start_pool(pool, name, on_wait=lambda what: view.wait_for(what.partition(" after ")[0]))
        yield PoolTeacher(name, config.given_teacher, view.say, read=read)
    finally:
        view.say("removing the teacher pool")
        stop_pool(name)


def request_rows(
    config: DistillConfig, teacher: CachedTeacher, rows: Iterator[Row], total: int, view: ProgressView
) -> None:
    """Requests the outputs of all rows, with enough requests under way to keep every replica busy."""
    view.say(f"computing the teacher's outputs for {total:,} rows")
    window = max(config.given_teacher.window, REQUESTS_PER_REPLICA * config.given_teacher.replicas.max)
    steps = read_ahead(_steps(rows, config.train.micro_batch_size), window)
    stream = Prefetcher(
        steps, teacher, window, config.given_teacher.window_mib * 2**20, PhaseClock(torch.device("cpu"))
    )
    done = 0
    while done < total:
        stream.next_step()
        batch, _ = stream.collect()
        done += len(batch.inputs["input_ids"])
        view.wait_for(f"teacher's outputs: {done:,} of {total:,} rows")


def _steps(rows: Iterator[Row], size: int) -> Iterator[StepBatches]:
    while part := list(islice(rows, size)):
        yield StepBatches([collate(part)], sum(row.num_loss_tokens for row in part), START)
