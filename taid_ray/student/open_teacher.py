"""The way from a student worker to its teacher, whatever that is: a pool, a model in this process, or stored outputs."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from taid_ray.data.batch import Row, collate
from taid_ray.data.run_images import RunImages
from taid_ray.media.pictures import Read
from taid_ray.student.context import WorkerContext
from taid_ray.student.engine import Student
from taid_ray.student.seeing import seeing_batches, seeing_note, teacher_seeing
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.cache.claims import ClaimRegistry, NoClaims
from taid_ray.teacher.cache.offline import OfflineTeacher
from taid_ray.teacher.cache.store import CacheStore
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.payload import EXACT, needs_head
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.pool.lease import PoolClaims
from taid_ray.teacher.protocol import TeacherClient

POOL_MARGIN_S = 300.0
"""Patience beyond teacher.timeout_s, within which the driver says whether the pool is up."""


def open_teacher(
    context: WorkerContext, student: Student, closing: ExitStack, read: Read | None = None
) -> TeacherClient | None:
    """Connects to the teacher, once it is up, and gives the student its head if it needs that. Collective.

    read: returns the bytes of an image; None in a run without images. Returns None if the run has no teacher.
    """
    section = context.config.teacher
    if section is None:
        context.note("student is ready")
        return None
    context.note("student is ready; waiting for the teacher")
    teacher = connect_teacher(context, read)
    closing.callback(teacher.close)
    if context.config.data.pack:
        teacher.info().require_packing()
    if needs_head(section.payload):
        student.teacher_head = teacher.head().to(context.device)
    return teacher


def connect_teacher(context: WorkerContext, read: Read | None = None) -> TeacherClient:
    """The pool's client once the pool is up, a teacher in this process, or stored outputs; behind the cache if there is one.

    read: as in `open_teacher`.
    """
    config, worker, scheduler = context.config, context.worker, context.scheduler
    section = config.given_teacher
    num_shared, media = worker.spec.vocabulary.num_shared, worker.spec.media
    teacher: TeacherClient
    claims: ClaimRegistry = NoClaims()
    if section.mode == "local":
        teacher = LocalTeacher(section, num_shared, context.device, media, read)
    elif section.is_stored:
        teacher = OfflineTeacher(config, num_shared, (worker.spec.fingerprint or {}).get("outputs", ""), media)
    else:
        scheduler.wait_for_pool(section.timeout_s + POOL_MARGIN_S)
        answers_at = torch.device("cpu") if config.cache.on else context.device
        teacher = PoolTeacher(worker.pool, section, scheduler.note, answers_at, context.world, read)
        claims = PoolClaims(worker.pool) if config.cache.on else claims
    if config.cache.on:
        teacher = CachedTeacher(teacher, CacheStore(config.cache, scheduler.note), claims, context.device)
    return teacher


def check_seeing(
    context: WorkerContext, teacher: TeacherClient | None, rows: Sequence[Row], images: RunImages | None
) -> None:
    """Measures on the first validation rows with images whether the teacher sees, and tells the driver's terminal.

    Does nothing without a teacher or images. Raises TeacherError if it does not see, DataError if no row has an image.
    """
    if teacher is None or images is None:
        return
    config = context.config
    batches = seeing_batches(rows, config.train.micro_batch_size, images.processor.grey, images.memory)
    if config.given_teacher.is_stored:
        batches = batches[:1]  # its record has the values of all rows
    found = teacher_seeing(teacher, batches, config.data.sees_at_least)
    context.note(seeing_note("teacher", found, config.data.sees_at_least))


def measured_payload_error(context: WorkerContext, teacher: TeacherClient | None, rows: Sequence[Row]) -> float:
    """Loss of information of an approximate payload on the first validation rows, see TeacherModel.payload_error.

    Tells the driver's terminal about it. 0 for exact payloads, and without a teacher.
    """
    section = context.config.teacher
    if teacher is None or section is None or section.payload in EXACT:
        return 0.0
    payload = section.payload
    batch = collate(rows[: context.config.train.micro_batch_size])
    error = teacher.payload_error(batch)
    lost = "mass outside the top-k" if payload == "topk" else "KL to the exact teacher"
    context.note(
        f"teacher.payload {payload}: {lost} is {error:.2g} on average, on {batch.num_loss_tokens} validation positions"
    )
    return error
