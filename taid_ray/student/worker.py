"""One student worker, inside its Ray Train process: connects, builds the student, opens the teacher, trains, finishes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor

from taid_ray.checkpoint.restore import Checkpoint, restore
from taid_ray.checkpoint.save import CheckpointWriter
from taid_ray.config.data import DataConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import Batch
from taid_ray.data.chat import chat_template
from taid_ray.data.dataset import validation_rows
from taid_ray.data.documents import open_documents
from taid_ray.data.fingerprint import check_outline
from taid_ray.data.run_images import RunImages
from taid_ray.data.shared_ids import check_ids
from taid_ray.data.store.prepared import PreparedData
from taid_ray.errors import CheckpointError, NonFiniteLossError, RunError, shortened
from taid_ray.files import write_json
from taid_ray.models.dropout import uses_dropout
from taid_ray.models.pair import media_of, run_tokenizer
from taid_ray.models.self_test import tested_head
from taid_ray.models.stopping import add_stop_ids
from taid_ray.models.student_init import build_student, origin
from taid_ray.run.directory import RunManifest
from taid_ray.run.layout import SUMMARY_FILE
from taid_ray.scheduler.aggregate import StepResult
from taid_ray.student.checkpoints import StudentCheckpoints
from taid_ray.student.context import WorkerContext, connect
from taid_ray.student.engine import Student
from taid_ray.student.engine_check import check_engine
from taid_ray.student.hooks import StepHooks
from taid_ray.student.loop import train_loop
from taid_ray.student.open_teacher import check_seeing, measured_payload_error, open_teacher
from taid_ray.student.pixels import BatchInputs
from taid_ray.student.prefetch import READ_AHEAD_STEPS, Prefetcher, read_ahead
from taid_ray.student.seeing import own_seeing_batches
from taid_ray.student.spec import Finished, Outcome, Stopped, WorkerSpec
from taid_ray.student.telemetry import MainTelemetry, Telemetry
from taid_ray.student.totals import RunTotals
from taid_ray.student.training_data import open_training_data
from taid_ray.student.validation import ValidationBatches
from taid_ray.student.validator import Validator
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.protocol import TeacherClient

SUSPECTS = 50
"""Number of documents named when a loss is not finite."""


def run_worker(worker: WorkerSpec) -> Outcome | None:
    """Trains one run to its end, or to where somebody stops it, from its newest checkpoint if it has one.

    Returns the outcome on rank 0, None elsewhere. Whatever way it ends, its connections and files are closed.
    """
    with ExitStack() as closing:
        context = connect(worker, closing)
        images = open_images(worker)
        student, checkpoint = build(context, images)
        if student.images is not None:
            closing.callback(student.images.close)
        teacher = open_teacher(context, student, closing, images.read if images else None)
        run = TrainingRun(context, student, teacher, checkpoint, closing, images)
        last = run.train()
        return run.finish(last)


def open_images(worker: WorkerSpec) -> RunImages | None:
    """The run's images, processed as the student's are; None in a run without any. Raises ModelError."""
    settings = worker.spec.media
    return None if settings is None else RunImages(media_of(origin(worker.config), settings))


def build(context: WorkerContext, images: RunImages | None = None) -> tuple[Student, Checkpoint | None]:
    """The student in its DeepSpeed engine, and the checkpoint it continues from. Collective."""
    config, spec = context.config, context.worker.spec
    checkpoint = restore(context.store, context.world, context.scheduler.note)
    context.note("student: building the model")
    model = build_student(config, spec.vocabulary).eval()
    head = tested_head(model, "student.model", config.data.pack)
    if uses_dropout(model, config):
        context.note(
            "note: the student uses dropout, so its trajectory depends on the number of workers and micro-batches"
        )
    context.note("student: starting DeepSpeed")
    inputs = BatchInputs(images.processor, images.read) if images else None
    student = Student(config, model, spec.vocabulary.num_shared, context.world, context.device, checkpoint, inputs)
    if student.unreached:
        context.note(
            f"note: {len(student.unreached)} of the student's tensors are not trained, because it computes past them, for "
            f"example {student.unreached[0]}"
        )
    if idle := student.idle_adapters:
        context.note(
            f"note: {len(idle)} adapter(s) of student.lora.target_modules are not trained, because the student computes past "
            f"them, for example {idle[0]}"
        )
    if checkpoint:
        checkpoint.release()  # the student has its tensors now
    check_engine(student, len(head.weight))
    return student, checkpoint


class TrainingRun:
    """The training of one attempt: what the loop needs around the student, and what follows it."""

    def __init__(
        self,
        context: WorkerContext,
        student: Student,
        teacher: TeacherClient | None,
        checkpoint: Checkpoint | None,
        closing: ExitStack,
        images: RunImages | None = None,
    ):
        """Joins the attempt that rank 0 has begun, and validates if the run is new. Collective."""
        config, worker, world = context.config, context.worker, context.world
        self._context, self._student, self._teacher = context, student, teacher
        self._start = context.scheduler.join(worker.attempt, world.size, checkpoint.result if checkpoint else None)
        self._cursor = checkpoint.cursor if checkpoint else None
        self._tokenizer = run_tokenizer(config)
        self._data = open_training_data(worker, self._tokenizer, world)
        for number, source in enumerate(config.data.sources):
            if worker.spec.fingerprint and (worker.data is None or source.valid is None):
                check_outline(worker.spec.fingerprint, number, open_documents(source, "train"), source.key)
        self._images, encoder = images, images.encoder_media if images else None
        held_out = {
            source.label: validation_rows(source, self._tokenizer, media=encoder) for source in config.data.validations
        }
        rows = [row for part in held_out.values() for row in part]
        check_ids(rows, worker.spec.vocabulary.num_shared, self._tokenizer.get_vocab())
        if checkpoint:
            context.note(f"going on after step {self._start.step}, from the checkpoint {checkpoint.name}")
            self._totals = RunTotals.from_state(checkpoint.totals)
        else:
            if world.is_main:
                check_seeing(context, teacher, rows, images)
            self._totals = RunTotals(measured_payload_error(context, teacher, rows) if world.is_main else 0.0)
        self._telemetry = open_telemetry(context, teacher, self._start.step, self._totals)
        closing.callback(self._telemetry.close)
        notify = context.scheduler.note
        self._writer = CheckpointWriter(context.store, config, world, worker.attempt, checkpoint, notify)
        size, limits = config.train.micro_batch_size, request_window(config)
        batches = {
            label: ValidationBatches(part, world, size, teacher, limits, len(held_out))
            for label, part in held_out.items()
        }
        seeing: Sequence[tuple[Batch, Batch]] = ()
        if images is not None:
            seeing = own_seeing_batches(rows, size, world, images.processor.grey, images.memory)
        self._validator = Validator(student, batches, self._totals, self._telemetry, seeing)
        if not checkpoint:
            self._validator.validate(0)

    def train(self) -> StepResult:
        """Trains to the end of the run or of the attempt. Returns the result of the last step. Collective."""
        context, student, config = self._context, self._student, self._context.config
        spec = context.worker.spec
        steps = read_ahead(self._data.steps(self._start.step, self._cursor), READ_AHEAD_STEPS)
        asked = self._teacher if config.learns_from_teacher else None
        stream = Prefetcher(steps, asked, *request_window(config), student.clock, student.prepare)
        checkpoints = StudentCheckpoints(self._writer, student, self._teacher, self._totals, spec.fingerprint)
        hooks = StepHooks(
            self._validator, self._telemetry, checkpoints, self._totals, context.preemption, spec.total_steps
        )
        context.note("training")
        with naming_suspect_documents(stream, context, self._writer):
            return train_loop(student, context.scheduler, stream, hooks, self._start, spec.total_steps)

    def finish(self, last: StepResult) -> Outcome | None:
        """Leaves the results of a finished run, or waits for the checkpoint of a stopped one. Collective.

        Raises RunError, which ends the run, if the results cannot be written: no reason to train again.
        """
        context, world = self._context, self._context.world
        if last.step < context.worker.spec.total_steps:
            context.note(f"stopping after step {last.step}; the checkpoint is being written")
            self._writer.close()
            return Stopped(last.step) if world.is_main else None
        if new := add_stop_ids(self._student.causal_lm, context.worker.spec.stop_ids):
            tokens = ", ".join(map(str, self._tokenizer.convert_ids_to_tokens(new)))
            context.note(f"RUN/model stops generating at {tokens} too, which ends what it was trained on")
        context.note("saving the model")
        state = self._student.gathered_state()  # fails as training does, if a worker is lost
        summary = self._summary(last.step)
        self._telemetry.sync()
        error = self._write_results(state, summary) if world.is_main else None
        (failed,) = world.sum([float(error is not None)])
        with suppress(CheckpointError):  # said where it could not be written; with the model there it is not needed
            self._writer.wait()
        if failed:
            told = not_written(context.config, error, self._writer, last.step) if error else ""
            raise RunError(world.share_bytes(told.encode()).decode()) from error
        self._writer.discard(last.step, self._totals.best)
        return Finished(summary) if world.is_main else None

    def _summary(self, steps: int) -> dict[str, Any]:
        """The content of summary.json. Collective."""
        teacher, student = self._teacher, self._student
        (teacher_tokens,) = self._context.world.sum([teacher.tokens if teacher else 0])
        summary = self._totals.summary(
            steps, student.num_parameters, self._data.counts, self._context.worker.attempt - 1
        )
        if teacher is None:
            return summary
        return summary | self._totals.of_teacher(
            teacher.info(), int(teacher_tokens), student.config.learns_from_teacher
        )

    def _write_results(self, state: dict[str, Tensor], summary: dict[str, Any]) -> Exception | None:
        """Writes model, tokenizer and summary. Returns what kept them from being written."""
        config = self._context.config
        try:
            self._student.save(state, config.run_dir / "model")
            write_results(config, summary, self._tokenizer, self._images.processor.processor if self._images else None)
        except Exception as error:  # of transformers, safetensors, tokenizers or the file system
            return error
        return None


def request_window(config: DistillConfig) -> tuple[int, int]:
    """Limits for what a worker has under way at the teacher: requests, and bytes of their answers."""
    if config.teacher is None:
        return 1, 0
    return config.teacher.window, config.teacher.window_mib * 2**20


def open_telemetry(
    context: WorkerContext, teacher: TeacherClient | None, last_step: int, totals: RunTotals
) -> Telemetry:
    """Opens the reporting of this rank, which continues after `last_step`."""
    if not context.world.is_main:
        return Telemetry()
    pool = teacher.inner if isinstance(teacher, CachedTeacher) else teacher
    asked = context.config.learns_from_teacher
    num_replicas = pool.num_replicas if asked and isinstance(pool, PoolTeacher) else None
    run = RunManifest(context.config).id
    return MainTelemetry(context.worker, run, last_step, totals, context.scheduler.note, num_replicas)


def not_written(config: DistillConfig, error: Exception, writer: CheckpointWriter, step: int) -> str:
    """Says, on rank 0, why the results of the run's last step could not be written, and what the same command will do."""
    if writer.newest == step:
        next_time = "it saves the model without training again"
    else:
        next_time = f"it trains again from {f'step {writer.newest}' if writer.newest else 'the beginning'}"
    return (
        f"the run is trained, but its model could not be written to {config.run_dir / 'model'} "
        f"({shortened(error)}). {writer.describe_newest()} Make room there, or put right what is wrong, "
        f"and give the same command again: {next_time}"
    )


def write_results(config: DistillConfig, summary: dict[str, Any], tokenizer: Any, processor: Any = None) -> None:
    """Writes the tokenizer beside the saved model; last the summary, which makes the run finished.

    processor: of images; with one, it is written with its tokenizer.
    """
    for source in config.data.sources:
        if source.format != "text" and source.chat_template is not None:
            tokenizer.chat_template = chat_template(source.chat_template, tokenizer)
            break
    if processor is not None:
        processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
    (tokenizer if processor is None else processor).save_pretrained(config.run_dir / "model")
    write_json(config.run_dir / SUMMARY_FILE, summary)


@contextmanager
def naming_suspect_documents(stream: Prefetcher, context: WorkerContext, writer: CheckpointWriter) -> Iterator[None]:
    """Adds the suspect documents and the last good checkpoint to the error of a loss that is not finite."""
    try:
        yield
    except NonFiniteLossError as error:  # which all ranks raise after the same step
        writer.wait()  # the checkpoint that is being written may be the last good one
        scheduler, data = context.scheduler, context.config.data
        ranks = context.world.gather((scheduler.sums_are_finite, stream.documents))
        # A loss that is not finite belongs to some ranks; gradients belong to all.
        guilty = [documents for finite, documents in ranks if not finite] or [documents for _, documents in ranks]
        documents = sorted(set().union(*guilty))
        raise NonFiniteLossError(
            f"step {scheduler.step}: {error}. It was computed from {named_documents(documents, data, context.worker.data)}. "
            f"{writer.describe_newest()} Remove what is wrong with a document, or change the settings, and begin a new run"
        ) from error


def named_documents(documents: Sequence[int], data: DataConfig, prepared: PreparedData | None) -> str:
    """Names documents by their numbers in their source. documents: numbers from 1 over all sources, ascending."""
    sizes = [source.opened.totals.documents for source in prepared.sources] if prepared else []
    named, first = [], 1
    for source, size in zip(data.sources, sizes or [documents[-1] if documents else 0], strict=True):
        own = [document - first + 1 for document in documents if first <= document < first + size]
        first += size
        if own:
            shown = ", ".join(map(str, own[:SUSPECTS])) + (", ..." if len(own) > SUSPECTS else "")
            named.append(f"documents {shown} of {source.key} ({source.train})")
    return " and ".join(named)
