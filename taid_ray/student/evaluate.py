"""`taid-ray eval`: measures a finished model against its teacher on any data, in one process and without Ray."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from taid_ray.config.fields import EVALUATED, TRAINING_ONLY
from taid_ray.config.schema import DistillConfig, build_config, known_keys, marks_of
from taid_ray.data.batch import Batch, collate
from taid_ray.data.dataset import validation_rows
from taid_ray.data.shared_ids import check_ids
from taid_ray.distributed.device import loss_memory_mib, resolve, torch_device
from taid_ray.errors import ConfigError, ModelError
from taid_ray.losses.chunked import chunk_tokens_for, chunked_scores
from taid_ray.losses.projection import Projection
from taid_ray.models.head import Head, hidden_states
from taid_ray.models.hub import restoring_hub_mode
from taid_ray.models.lengths import context_length
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.pair import check_models, model_configs, run_tokenizer, shared_vocabulary
from taid_ray.models.probes import long_probe, not_finite
from taid_ray.models.self_test import tested_head
from taid_ray.run.metrics import perplexity
from taid_ray.student.rouge import check_rouge_score, conversations, rouge_scores
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.payload import TeacherOutput

ROUGE_ROWS = 64
BATCH_ROWS = 8


@dataclass(frozen=True)
class Measurement:
    """Means over the loss positions, in nats, and optionally ROUGE-L (0 to 1)."""

    cross_entropy: float
    teacher_cross_entropy: float
    kl: float
    tokens: int
    sequence_length: int
    rouge_l: float | None
    teacher_rouge_l: float | None


def evaluate_model(model: str, teacher: str, data: str, overrides: Sequence[str], rouge: bool) -> Measurement:
    """Scores `model` and `teacher` on at most data.valid_documents documents.

    overrides: dotted keys of teacher, student and data sections. data.sequence_length defaults to what both models hold,
    student.dtype to the checkpoint's own. Raises a TaidRayError for everything a user can put right.
    """
    config = _config(model, teacher, data, overrides)
    check_used(overrides)
    if rouge:
        check_rouge(config)
    with restoring_hub_mode():
        return _measure(config, rouge)


def _measure(config: DistillConfig, rouge: bool) -> Measurement:
    teacher_config, student_config = model_configs(config)
    if "sequence_length" not in config.data.model_fields_set:
        longest = min(context_length(teacher_config, student_config), config.data.sequence_length)
        config = config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": longest})})
    check_models(config, teacher_config, student_config)
    device = torch_device(resolve(config.device, torch.cuda.is_available()))
    tokenizer = run_tokenizer(config)
    vocabulary = shared_vocabulary(config, teacher_config, student_config)
    rows = validation_rows(config.data.sources[0], tokenizer)
    check_ids(rows, vocabulary.num_shared, tokenizer.get_vocab())
    student, head = load_student(config, device)
    teacher = load_teacher(config, vocabulary.num_shared, device)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(rows), BATCH_ROWS):
        batch = collate(rows[start : start + BATCH_ROWS])
        sums += _score(student, head.rows(vocabulary.num_shared), teacher, batch, device)
    scores: list[float | None] = [None, None]
    if rouge:
        samples, stop_ids = conversations(
            config.data.sources[0], tokenizer, min(ROUGE_ROWS, config.data.valid_documents)
        )
        scores = [
            statistics.fmean(rouge_scores(each, tokenizer, samples, device, stop_ids))
            for each in (student, teacher.model)
        ]
    student_ce, teacher_ce, kl, tokens = sums.tolist()
    length = config.data.sequence_length
    return Measurement(student_ce / tokens, teacher_ce / tokens, kl / tokens, int(tokens), length, *scores)


def load_student(config: DistillConfig, device: torch.device) -> tuple[Any, Head]:
    """The model to measure and its head, tested like a student of a run."""
    student = config.student
    dtype = None if "dtype" in student.model_fields_set else "auto"
    model = load_causal_lm(student, dtype=dtype, device=device).to(device)
    length = long_probe(device, config.data.sequence_length)
    return model, tested_head(model, "student.model", config.data.pack, length)


def load_teacher(config: DistillConfig, num_shared: int, device: torch.device) -> TeacherModel:
    """The teacher. Raises ModelError if it cannot be given the rows that the student is given."""
    teacher = TeacherModel(config.given_teacher, num_shared, device)
    if config.data.pack:
        teacher.info().require_packing()
    return teacher


def measurement_table(found: Measurement) -> Table:
    """One row for the model, one for its teacher."""
    table = Table(title=f"{found.tokens:,} tokens, in rows of at most {found.sequence_length}")
    for column in (
        "",
        "cross-entropy",
        "perplexity",
        "KL to the teacher",
        *(["ROUGE-L"] if found.rouge_l is not None else []),
    ):
        table.add_column(column, justify="right" if column else "left", overflow="fold")

    def row(name: str, cross_entropy: float, kl: str, rouge: float | None) -> None:
        shown = [] if rouge is None else [f"{rouge:.4f}"]
        table.add_row(name, f"{cross_entropy:.4f}", f"{perplexity(cross_entropy):.2f}", kl, *shown)

    row("model", found.cross_entropy, f"{found.kl:.4f}", found.rouge_l)
    row("teacher", found.teacher_cross_entropy, "-", found.teacher_rouge_l)
    return table


def _config(model: str, teacher: str, data: str, overrides: Sequence[str]) -> DistillConfig:
    tree = {
        "teacher": {"model": teacher},
        "student": {"model": model},
        "data": {"train": data, "valid": data},
        "train": {"steps": 1},
    }
    return build_config(tree, overrides)


def check_used(overrides: Sequence[str]) -> None:
    """Raises ConfigError for a key that would change nothing, or a whole section, which would replace what eval was given."""
    for override in overrides:
        key = override.partition("=")[0]
        if not _used(key):
            section = f"{key.partition('.')[0]}."
            near = [known for known in known_keys() if known.startswith(section) and _used(known)]
            used = ", ".join(near) or "keys of teacher, student and data"
            raise ConfigError(f"{key}: eval makes no use of this key; leave it out. It uses {used}")


def _used(key: str) -> bool:
    marks = marks_of(key) if "." in key or key == "device" else []
    return EVALUATED in marks and TRAINING_ONLY not in marks


@torch.no_grad()
def _score(student: Any, head: Head, teacher: TeacherModel, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sums over the batch's loss positions, [student's cross-entropy, teacher's, KL, positions]."""
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    hidden = hidden_states(student, inputs).flatten(0, 1)[batch.loss_positions.to(device)]
    if not bool(torch.isfinite(hidden).all()):
        raise ModelError(f"student.model: its hidden states on these data are {not_finite(hidden.dtype, 'student')}")
    answer = teacher.score(batch.inputs, batch.loss_positions, batch.labels)
    teacher.info().check_output(answer, batch.num_loss_tokens)
    scores = chunked_scores(
        Projection(hidden, head.weight, head.bias, head.transform),
        TeacherOutput("hidden", answer).target(teacher.head().to(device)),
        batch.labels.to(device),
        chunk_tokens=chunk_tokens_for(head.weight.shape[0], loss_memory_mib(device) * 2**20),
    )
    assert scores.teacher_ce is not None and scores.kl is not None
    figures = (scores.student_ce, scores.teacher_ce, scores.kl, batch.num_loss_tokens)
    return torch.tensor([float(figure) for figure in figures], dtype=torch.float64)


def check_rouge(config: DistillConfig) -> None:
    """Raises ConfigError if the data have no responses, or the package rouge-score is missing."""
    if config.data.format == "text":
        raise ConfigError("--rouge needs prompts and responses; set format=chat or format=prompt_response (found text)")
    check_rouge_score("--rouge")
