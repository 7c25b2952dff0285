"""One student worker: builds the parts inside its Ray Train process, enters the loop, and leaves the run's results."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from taid_ray.checkpoint.restore import restore
from taid_ray.checkpoint.save import CheckpointWriter
from taid_ray.checkpoint.store import CheckpointStore
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import Row, collate
from taid_ray.data.batching import num_micro_batches
from taid_ray.data.chat import chat_template
from taid_ray.data.dataset import START, Cursor, TrainingData, validation_rows
from taid_ray.data.shared_ids import check_ids
from taid_ray.distributed.device import torch_device
from taid_ray.distributed.world import World
from taid_ray.errors import ClusterError, NonFiniteLossError
from taid_ray.files import write_json
from taid_ray.models.head import tested_head
from taid_ray.models.hub import offline_if_unreachable
from taid_ray.models.pair import run_tokenizer
from taid_ray.models.student_init import build_student
from taid_ray.run.directory import RunManifest
from taid_ray.run.layout import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from taid_ray.run.metrics import MetricLog
from taid_ray.scheduler.client import SchedulerClient
from taid_ray.student.clock import PhaseClock
from taid_ray.student.engine import Student
from taid_ray.student.hooks import StepHooks
from taid_ray.student.loop import train_loop
from taid_ray.student.prefetch import READ_AHEAD_STEPS, Prefetcher, read_ahead, step_batches
from taid_ray.student.spec import RunSpec, WorkerSpec
from taid_ray.student.totals import RunTotals
from taid_ray.student.validation import HeldOut
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.cache.claims import ClaimRegistry, NoClaims
from taid_ray.teacher.cache.offline import OfflineTeacher
from taid_ray.teacher.cache.store import CacheStore
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.payload import EXACT, needs_head
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.pool.lease import PoolClaims
from taid_ray.teacher.protocol import TeacherClient
from taid_ray.tracking.prometheus import StudentGauges

POOL_MARGIN_S = 300.0
"""Beyond teacher.timeout_s, within which the driver says whether the pool is up."""
SUSPECTS = 50
"""Documents named when a loss is not finite."""


def run_worker(job: WorkerSpec) -> dict[str, Any] | None:
    """Trains one run to its end, or to where somebody stops it, from its newest checkpoint if it has one.

    Returns on rank 0 the summary, or {"stopped": step}; None elsewhere.
    """
    config, spec, world = job.config, job.spec, World.current()
    device = torch_device(job.device, int(os.environ["LOCAL_RANK"]))
    scheduler = SchedulerClient(job.scheduler, world.rank, config.peer_timeout_s)
    note = scheduler.note if world.is_main else _ignore
    if os.environ["LOCAL_RANK"] == "0":  # one worker speaks for its node
        check_run_dir_writable(config.run_dir, world.rank)
    offline_if_unreachable([config.teacher.model, config.student.model, config.data.train, config.data.valid])
    torch.manual_seed(config.train.seed + world.rank)
    # First of all, because from here on no worker of an earlier attempt gets any further, should one be alive.
    attempt = world.share(scheduler.begin(world.size) if world.is_main else 0)

    store = CheckpointStore(job.checkpoints)
    restored = restore(store, world, scheduler.note)
    note("student: building the model")
    model = build_student(config, spec.vocabulary).eval()
    tested_head(model, "student.model", config.data.pack)
    if uses_dropout(model, config):
        note("note: the student uses dropout, so its trajectory depends on the number of workers and micro-batches")
    note("student: starting DeepSpeed")
    clock = PhaseClock(device)
    student = Student(config, model, spec.vocabulary.num_shared, world, device, clock, restored)
    if restored:
        restored.forget()  # the tensors; the student has them now
    tokenizer = run_tokenizer(config)

    note("student is ready; waiting for the teacher")
    teacher = connect_teacher(job, scheduler, device, world)
    teacher_head = teacher.head().to(device) if needs_head(config.teacher.payload) else None
    last = scheduler.join(attempt, world.size, restored.state.result if restored else None)
    valid_rows = validation_rows(config.data, tokenizer)
    check_ids(valid_rows, spec.vocabulary.num_shared, tokenizer.get_vocab())
    window = config.teacher.window, config.teacher.window_mib * 2**20
    held_out = HeldOut(valid_rows, world, config.train.micro_batch_size, teacher, *window)
    if restored:
        record = RunTotals.from_state(restored.state.record)
        note(f"going on after step {last.step}, from the checkpoint {restored.name}")
    else:
        record = RunTotals(measured_payload_error(config, teacher, valid_rows, note) if world.is_main else 0.0)

    saver = CheckpointWriter(store, config.checkpoint, world, attempt, restored, config.peer_timeout_s, scheduler.note)
    log = MetricLog(config.run_dir / METRICS_FILE, last.step) if world.is_main else None
    gauges = StudentGauges(RunManifest(config).id, spec.total_steps, job.restarts) if world.is_main else None
    between = StepHooks(
        config, spec, world, student, teacher, teacher_head, held_out, record, saver, log, scheduler, gauges
    )
    if not restored:
        between.validate(0)
    accumulation = num_micro_batches(config.train.batch_size, config.train.micro_batch_size, world.size)
    data = TrainingData(config.data, tokenizer, config.train.seed, config.train.batch_size)
    start = restored.state.cursor if restored else START
    rows = read_ahead(training_batches(data, spec, tokenizer, last.step, start), READ_AHEAD_STEPS)
    batches = step_batches(rows, world, accumulation)
    stream = Prefetcher(batches, teacher, *window, clock)
    note("training")
    with naming_suspect_documents(stream, scheduler, world, config, saver):
        last = train_loop(
            config.train,
            spec.total_steps,
            student,
            teacher_head,
            scheduler,
            stream,
            last,
            clock,
            between.request,
            between,
        )
    if last.step < spec.total_steps:
        note(f"stopping after step {last.step}; the checkpoint is being written")
        saver.finish()
        outcome: dict[str, Any] = {"stopped": last.step}
    else:
        between.validate(spec.total_steps)
        note("saving the model")
        saver.settle()
        student.save(config.run_dir / "model")
        (teacher_tokens,) = world.sum([teacher.tokens])
        outcome = record.summary(
            last.step, teacher.info(), int(teacher_tokens), student.num_parameters, data.counts, job.restarts
        )
        if world.is_main:
            write_results(config, outcome, tokenizer)
    if log is not None:
        log.close()
    teacher.close()
    scheduler.close()
    return outcome if world.is_main else None


def write_results(config: DistillConfig, summary: dict[str, Any], tokenizer: Any) -> None:
    """Puts the tokenizer beside the saved model; last the summary, with which the run is finished."""
    if config.data.format != "text":
        tokenizer.chat_template = chat_template(config.data.chat_template, tokenizer)
    tokenizer.save_pretrained(config.run_dir / "model")
    write_json(config.run_dir / SUMMARY_FILE, summary)


def training_batches(
    data: TrainingData, spec: RunSpec, tokenizer: Any, done: int = 0, start: Cursor = START
) -> Iterator[tuple[list[Row], Cursor]]:
    """The run's global batches after step `done`, each checked to hold shared ids only; ends with the last step."""
    tokens = tokenizer.get_vocab()
    for _, (rows, cursor) in zip(range(done, spec.total_steps), data.batches(start), strict=False):
        check_ids(rows, spec.vocabulary.num_shared, tokens)
        yield rows, cursor


@contextmanager
def naming_suspect_documents(
    stream: Prefetcher, scheduler: SchedulerClient, world: World, config: DistillConfig, saver: CheckpointWriter
) -> Iterator[None]:
    """Adds to a loss that is not finite where to look for its cause, and where the run could go on from."""
    try:
        yield
    except NonFiniteLossError as error:  # which all ranks raise after the same step
        saver.settle()  # what is being written may be the last good one
        found = world.gather((scheduler.sums_are_finite, stream.documents))
        # A loss that is not finite is some ranks'; gradients are everybody's.
        guilty = [documents for finite, documents in found if not finite] or [documents for _, documents in found]
        documents = sorted(set().union(*guilty))
        shown = ", ".join(map(str, documents[:SUSPECTS])) + (", ..." if len(documents) > SUSPECTS else "")
        raise NonFiniteLossError(
            f"step {scheduler.step}: {error}. It was computed from documents {shown} of data.train ({config.data.train}). "
            f"{saver.last_good()} Remove what is wrong with a document, or change the settings, and begin a new run"
        ) from error


def connect_teacher(job: WorkerSpec, scheduler: SchedulerClient, device: torch.device, world: World) -> TeacherClient:
    """The pool's client once the pool is up, a teacher in this process, or none; behind the cache if there is one."""
    config, num_shared = job.config, job.spec.vocabulary.num_shared
    teacher: TeacherClient
    claims: ClaimRegistry = NoClaims()
    if config.teacher.mode == "local":
        teacher = LocalTeacher(config.teacher, num_shared, device)
    elif config.teacher.mode == "cache":
        teacher = OfflineTeacher(config, num_shared)
    else:
        scheduler.wait_for_pool(config.teacher.timeout_s + POOL_MARGIN_S)
        answers_at = torch.device("cpu") if config.cache.on else device
        teacher = PoolTeacher(job.pool, config.teacher, scheduler.note, answers_at, world)
        claims = PoolClaims(job.pool) if config.cache.on else claims
    if config.cache.on:
        teacher = CachedTeacher(teacher, CacheStore(config.cache, scheduler.note), claims, device)
    if config.data.pack:
        teacher.info().require_packing()
    return teacher


def measured_payload_error(
    config: DistillConfig, teacher: TeacherClient, rows: Sequence[Row], note: Callable[[str], None]
) -> float:
    """What an approximate payload loses on the first validation rows, see TeacherModel.payload_error; says it."""
    payload = config.teacher.payload
    if payload in EXACT:
        return 0.0
    batch = collate(rows[: config.train.micro_batch_size])
    error = teacher.payload_error(batch)
    lost = "mass outside the top-k" if payload == "topk" else "KL to the exact teacher"
    note(
        f"teacher.payload {payload}: {lost} is {error:.2g} on average, on {batch.num_loss_tokens} validation positions"
    )
    return error


def uses_dropout(model: Any, config: DistillConfig) -> bool:
    """Whether training draws random numbers, by the model's config and the adapters'."""
    values = model.config.get_text_config().to_dict()
    rates = [value for key, value in values.items() if ("dropout" in key or "pdrop" in key)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates) or bool(
        config.student.lora and config.student.lora.dropout
    )


def check_run_dir_writable(run_dir: Path, rank: int) -> None:
    """Raises ClusterError if this node does not see the driver's run directory, or may not write there."""
    probe = run_dir / f".probe-{rank}"
    if not (run_dir / CONFIG_FILE).exists():
        raise ClusterError(
            f"out: the run directory {run_dir}, made by the driver, does not exist on node {os.uname().nodename}; "
            "choose a directory on a file system that all nodes share"
        )
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ClusterError(f"out: node {os.uname().nodename} cannot write to {run_dir}: {error}") from None


def _ignore(message: str) -> None:
    """Only rank 0 speaks."""
