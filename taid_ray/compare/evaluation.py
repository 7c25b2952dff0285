"""Evaluation of finished students against their teacher on the held-out documents, in one process and without Ray."""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taid_ray.compare.measures import ModelTotals, PairTotals
from taid_ray.config.data import DataSource
from taid_ray.config.models import StudentConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import Batch, collate
from taid_ray.data.dataset import validation_rows
from taid_ray.distributed.device import loss_memory_mib
from taid_ray.errors import ModelError
from taid_ray.losses.chunked import chunk_tokens_for
from taid_ray.losses.projection import Projection
from taid_ray.models.head import Head, hidden_states
from taid_ray.models.pair import model_configs, run_tokenizer, shared_vocabulary
from taid_ray.models.probes import not_finite
from taid_ray.models.student_init import origin
from taid_ray.student.evaluate import BATCH_ROWS, load_student
from taid_ray.student.generation import answers
from taid_ray.student.rouge import conversations, rouge_l
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.payload import TeacherOutput


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one student. Cross-entropy and KL are nats per loss position; masses and ROUGE-L lie in [0, 1]."""

    documents: list[str]
    """Names of the held-out documents: their numbers, from 1, behind the name of their source where there are several."""
    tokens: list[int]
    """Loss positions of each document."""
    by_document: dict[str, list[float]]
    """Means over each document's loss positions, by figure: cross_entropy, forward_kl, reverse_kl, head_mass, tail_mass."""
    mean: dict[str, float]
    """Means over all loss positions by the same names, and calibration_error, head_mass_of_the_mean,
    tail_mass_of_the_mean and, on prompts with responses, rouge_l (a mean over documents)."""
    calibration: list[dict[str, float]]
    """Bins of confidence, see `Calibration.bins`."""
    rouge_documents: list[str]
    """Names of the documents whose prompts were answered; none for plain text."""
    rouge_l: list[float]
    """ROUGE-L of each answer."""
    teacher: dict[str, float]
    """`mean` of the teacher on the same documents, without the divergences."""

    def as_json(self) -> dict[str, Any]:
        """The evaluation as a mapping that JSON can hold, and that `Evaluation(**...)` takes."""
        return asdict(self)


class Evaluator:
    """Holds the teacher and the documents, so that many students can be evaluated one after another."""

    def __init__(self, config: DistillConfig, device: torch.device):
        """Loads the teacher of `config`, which answers exactly whatever teacher.payload is, and the held-out documents.

        Each document is a row of its own. Raises a TaidRayError if they cannot be used.
        """
        teacher_config, student_config = model_configs(config)
        self._config, self._device, self._tokenizer = config, device, run_tokenizer(config)
        self._num_shared = shared_vocabulary(config, teacher_config, student_config).num_shared
        rows = [
            (label(source, row.documents[0]), row)
            for source in config.data.validations
            for row in validation_rows(source.model_copy(update={"pack": False}), self._tokenizer)
        ]
        self._documents = list(dict.fromkeys(name for name, _ in rows))
        rows.sort(key=lambda named: len(named[1].input_ids))  # for little padding
        self._batches = [
            (collate([row for _, row in part]), torch.tensor([self._documents.index(name) for name, _ in part]))
            for part in (rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS))
        ]
        section = config.given_teacher.model_copy(update={"payload": "hidden", "mode": "local", "shards": 1})
        self._teacher = TeacherModel(section, self._num_shared, device)
        self._teacher_head = self._teacher.head().to(device)
        asked = [source for source in config.data.validations if source.format != "text"]
        self._prompts = [(source, *conversations(source, self._tokenizer, source.valid_documents)) for source in asked]
        self._teacher_rouge = self._rouge(self._teacher.model)

    def evaluate(self, model: Path) -> Evaluation:
        """Evaluates the student in a Hugging Face directory, in the precision of its files. Raises ModelError."""
        trusted = origin(self._config).trust_remote_code
        section = StudentConfig(model=str(model), attention=self._config.student.attention, trust_remote_code=trusted)
        student, head = load_student(self._config.model_copy(update={"student": section}), self._device)
        totals = PairTotals(len(self._documents), self._num_shared)
        for batch, documents in self._batches:
            self._add(totals, batch, documents, student, head.rows(self._num_shared))
        rouge = self._rouge(student)
        by_document = totals.student.sums | totals.divergences
        return Evaluation(
            documents=self._documents,
            tokens=totals.tokens.long().tolist(),
            by_document={name: (sums / totals.tokens).tolist() for name, sums in by_document.items()},
            mean=_means(by_document, totals.tokens) | _whole(totals.student) | _mean_rouge(rouge),
            calibration=totals.student.calibration.bins(),
            rouge_documents=[label(source, each.document) for source, found, _ in self._prompts for each in found],
            rouge_l=rouge,
            teacher=_means(totals.teacher.sums, totals.tokens)
            | _whole(totals.teacher)
            | _mean_rouge(self._teacher_rouge),
        )

    def _rouge(self, model: Any) -> list[float]:
        """ROUGE-L of the model's answers to the prompts; nothing for plain text."""
        return [
            score
            for _, samples, stop_ids in self._prompts
            for score in rouge_l(answers(model, self._tokenizer, samples, self._device, stop_ids))
        ]

    @torch.no_grad()
    def _add(self, totals: PairTotals, batch: Batch, documents: Tensor, student: Any, head: Head) -> None:
        """Adds a batch's figures. documents: [B], the index of each row's document."""
        inputs = {name: tensor.to(self._device) for name, tensor in batch.inputs.items()}
        positions = batch.loss_positions.to(self._device)
        hidden = hidden_states(student, inputs).flatten(0, 1)[positions]
        if not bool(torch.isfinite(hidden).all()):
            raise ModelError(
                f"the student's hidden states on the held-out data are {not_finite(hidden.dtype, 'student')}"
            )
        answer = self._teacher.score(batch.inputs, batch.loss_positions, batch.labels)
        self._teacher.info().check_output(answer, batch.num_loss_tokens)
        target = TeacherOutput("hidden", answer).target(self._teacher_head)
        assert isinstance(target, Projection)
        totals.add(
            Projection(hidden, head.weight, head.bias, head.transform),
            target,
            batch.labels.to(self._device),
            documents[batch.loss_positions // batch.inputs["input_ids"].shape[1]].to(self._device),
            chunk_tokens=chunk_tokens_for(self._num_shared, loss_memory_mib(self._device) * 2**20),
        )


def label(source: DataSource, number: int) -> str:
    """Names a document of a source of validation data."""
    return f"{source.label} {number}" if source.label else str(number)


def _means(by_document: dict[str, Tensor], tokens: Tensor) -> dict[str, float]:
    return {name: float(sums.sum() / tokens.sum()) for name, sums in by_document.items()}


def _whole(model: ModelTotals) -> dict[str, float]:
    """The figures that belong to all documents together."""
    head, tail = model.masses_of_the_mean()
    error = model.calibration.error()
    return {"calibration_error": error, "head_mass_of_the_mean": head, "tail_mass_of_the_mean": tail}


def _mean_rouge(scores: list[float]) -> dict[str, float]:
    return {"rouge_l": statistics.fmean(scores)} if scores else {}
