"""One student worker: builds the parts inside its Ray Train process, enters the loop, and leaves the run's results."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from taid_ray.actors.client import PoolTeacher
from taid_ray.actors.scheduler import SchedulerClient
from taid_ray.batch import Row, collate
from taid_ray.bottleneck import Usage, verdict
from taid_ray.chat import chat_template
from taid_ray.clock import PhaseClock
from taid_ray.config import DistillConfig
from taid_ray.data import Cursor, TrainingData, validation_rows
from taid_ray.device import torch_device
from taid_ray.encoding import Counts
from taid_ray.errors import ClusterError
from taid_ray.evaluate import Evaluation, evaluate
from taid_ray.hub import offline_if_unreachable
from taid_ray.metrics import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, MetricLog, StepMetrics, write_json
from taid_ray.models import tested_head
from taid_ray.payload import EXACT, needs_head
from taid_ray.preflight import Job, Plan, run_tokenizer
from taid_ray.report import write_model_card, write_plots
from taid_ray.stream import Prefetcher, num_micro_batches, read_ahead, step_batches
from taid_ray.student import Student
from taid_ray.student_model import build_student
from taid_ray.teacher_model import LocalTeacher, TeacherClient, TeacherInfo
from taid_ray.train import train_loop
from taid_ray.vocabulary import check_ids
from taid_ray.world import World

READ_AHEAD_STEPS = 8
USAGE_STEPS = 100
"""Steps over which is judged what holds the run back."""


def run_worker(job: Job) -> dict[str, Any] | None:
    """Trains one run to its end. Returns the summary on rank 0, None elsewhere."""
    config, plan, world = job.config, job.plan, World.current()
    device = torch_device(job.device, int(os.environ["LOCAL_RANK"]))
    scheduler = SchedulerClient(job.scheduler, world.rank)
    note = scheduler.note if world.is_main else _ignore
    check_run_dir(config.run_dir, world.rank)
    offline_if_unreachable([config.teacher.model, config.student.model, config.data.train, config.data.valid])
    torch.manual_seed(config.train.seed + world.rank)

    note("student: building the model")
    model = build_student(config, plan.vocabulary).eval()
    tested_head(model, "student.model", config.data.pack)
    if uses_dropout(model, config):
        note("note: the student uses dropout, so its trajectory depends on the number of workers and micro-batches")
    note("student: starting DeepSpeed")
    clock = PhaseClock(device)
    student = Student(config, model, plan.vocabulary.num_shared, world, device, clock)
    tokenizer = run_tokenizer(config)

    note("student is ready; waiting for the teacher")
    teacher = connect_teacher(job, scheduler, device)
    teacher_head = teacher.head().to(device) if needs_head(config.teacher.payload) else None
    attempt, last = scheduler.begin(world.size, None) if world.is_main else (0, None)
    last = scheduler.join(world.share(attempt), world.size, last)

    held_out = validation_rows(config.data, tokenizer)
    check_ids(held_out, plan.vocabulary.num_shared, tokenizer.get_vocab())

    record = Record(measured_payload_error(config, teacher, held_out, note) if world.is_main else 0.0)

    def validate(step: int) -> None:
        note(f"validating on {len(held_out)} rows after step {step}")
        found = evaluate(student, teacher, teacher_head, held_out, world, config.train.micro_batch_size)
        note(f"validation: cross-entropy {found.cross_entropy:.4f}, KL to the teacher {found.kl:.4f}")
        record.validations[step] = found

    def on_step(metrics: StepMetrics) -> None:
        record.add(metrics)
        if log is not None:
            log.write(metrics)
            scheduler.publish(asdict(metrics))
            if isinstance(teacher, PoolTeacher):
                say_what_holds_back(record, metrics, plan.total_steps, teacher, note)
        every = config.train.eval_every
        if every and metrics.step % every == 0 and metrics.step < plan.total_steps:
            validate(metrics.step)

    log = MetricLog(config.run_dir / METRICS_FILE) if world.is_main else None
    validate(0)
    accumulation = num_micro_batches(config.train.batch_size, config.train.micro_batch_size, world.size)
    data = TrainingData(config.data, tokenizer, config.train.seed, config.train.batch_size)
    rows = read_ahead(training_batches(data, plan, tokenizer), READ_AHEAD_STEPS)
    batches = step_batches(rows, world, accumulation)
    stream = Prefetcher(batches, teacher, config.teacher.window, config.teacher.window_mib * 2**20, clock)
    note("training")
    train_loop(config.train, plan.total_steps, student, teacher_head, scheduler, stream, last, clock, on_step)
    validate(plan.total_steps)

    note("saving the model")
    student.save(config.run_dir / "model")
    (teacher_tokens,) = world.sum([teacher.tokens])
    summary = record.summary(plan, teacher.info(), int(teacher_tokens), student.num_parameters, data.counts)
    if log is not None:
        log.close()
        leave_results(config, summary, tokenizer)
    teacher.close()
    scheduler.close()
    return summary if world.is_main else None


def leave_results(config: DistillConfig, summary: dict[str, Any], tokenizer: Any) -> None:
    """Puts tokenizer, summary, model card and plots beside the saved model; what cannot be made again comes first."""
    write_json(config.run_dir / SUMMARY_FILE, summary)
    if config.data.format != "text":
        tokenizer.chat_template = chat_template(config.data.chat_template, tokenizer)
    tokenizer.save_pretrained(config.run_dir / "model")
    write_model_card(config.run_dir, config, summary)
    write_plots(config.run_dir)


def training_batches(data: TrainingData, plan: Plan, tokenizer: Any) -> Iterator[tuple[list[Row], Cursor]]:
    """The run's global batches, each checked to hold shared ids only; ends with the last step."""
    tokens = tokenizer.get_vocab()
    for _, (rows, cursor) in zip(range(plan.total_steps), data.batches(), strict=False):
        check_ids(rows, plan.vocabulary.num_shared, tokens)
        yield rows, cursor


def connect_teacher(job: Job, scheduler: SchedulerClient, device: torch.device) -> TeacherClient:
    """The pool's client once the pool is up, or a teacher in this process."""
    teacher: TeacherClient
    if job.config.teacher.mode == "local":
        teacher = LocalTeacher(job.config.teacher, job.plan.vocabulary.num_shared, device)
    else:
        scheduler.wait_for_pool()
        teacher = PoolTeacher(job.pool, job.config.teacher, scheduler.note, device)
    if job.config.data.pack:
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


def say_what_holds_back(
    record: "Record", metrics: StepMetrics, total_steps: int, teacher: PoolTeacher, note: Callable[[str], None]
) -> None:
    """One line every USAGE_STEPS steps and after the last one: student, teacher or wire, and the replicas to have."""
    if metrics.step == 1:  # waits for the first answers, which nothing could have asked for earlier
        return
    usage = record.usage
    usage.add(metrics.step_s, metrics.teacher_wait_s, metrics.teacher_compute_s, metrics.payload_bytes)
    if usage.steps == USAGE_STEPS or metrics.step == total_steps:
        steps = f"steps {metrics.step - usage.steps + 1} to {metrics.step}"
        note(f"{steps}: {verdict(usage, teacher.num_replicas())}")
        record.usage = Usage()


def uses_dropout(model: Any, config: DistillConfig) -> bool:
    """Whether training draws random numbers, by the model's config and the adapters'."""
    values = model.config.get_text_config().to_dict()
    rates = [value for key, value in values.items() if ("dropout" in key or "pdrop" in key)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates) or bool(
        config.student.lora and config.student.lora.dropout
    )


def check_run_dir(run_dir: Path, rank: int) -> None:
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


class Record:
    """What the summary needs from the run."""

    def __init__(self, payload_error: float) -> None:
        self.payload_error = payload_error
        self.usage = Usage()
        self.started = time.monotonic()
        self.validations: dict[int, Evaluation] = {}
        self.tokens = self.payload_bytes = 0
        self.last: StepMetrics | None = None

    def add(self, metrics: StepMetrics) -> None:
        self.last = metrics
        self.tokens += metrics.tokens
        self.payload_bytes += metrics.payload_bytes

    def summary(
        self, plan: Plan, teacher: TeacherInfo, teacher_tokens: int, parameters: int, counts: Counts
    ) -> dict[str, Any]:
        """The content of summary.json. teacher_tokens: over all workers; parameters: the student's; counts: of the data."""
        first, final = self.validations[0], self.validations[plan.total_steps]
        assert self.last is not None

        def figures(found: Evaluation) -> dict[str, Any]:
            return {"cross_entropy": found.cross_entropy, "kl": found.kl, "parameters": parameters}

        return {
            "steps": self.last.step,
            "teacher": {"cross_entropy": first.teacher_cross_entropy, "parameters": teacher.num_parameters},
            "before": figures(first),
            "after": figures(final),
            "validations": [{"step": step} | asdict(found) for step, found in self.validations.items()],
            "t": self.last.t,
            "tokens": self.tokens,
            "samples": self.last.samples_seen,
            "wall_s": time.monotonic() - self.started,
            "teacher_tokens": teacher_tokens,
            "payload_bytes": self.payload_bytes,
            "payload_error": self.payload_error,
            "dropped_teacher_mass": teacher.dropped_mass,
            "documents_read": counts.documents,
            "dropped_documents": counts.dropped,
            "truncated_documents": counts.truncated,
            "restarts": 0,  # a run ends with its first failure until it can resume from checkpoints
        }


def _ignore(message: str) -> None:
    """Only rank 0 speaks."""
