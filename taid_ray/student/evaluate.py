"""`taid-ray eval`: measures a finished model against its teacher on any data, in one process and without Ray."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from taid_ray.config.fields import EVALUATED, TRAINING_ONLY
from taid_ray.config.schema import DistillConfig, build_config, known_keys, marks_of
from taid_ray.data.batch import Batch, Row, collate
from taid_ray.data.dataset import validation_rows
from taid_ray.data.packing import Sample
from taid_ray.data.run_images import RunImages
from taid_ray.data.shared_ids import check_ids
from taid_ray.distributed.device import loss_memory_mib, resolve, torch_device
from taid_ray.errors import ConfigError, ModelError
from taid_ray.losses.chunked import chunk_tokens_for, chunked_scores
from taid_ray.losses.projection import Projection
from taid_ray.media.pictures import Pictures
from taid_ray.media.processor import MediaProcessor, MediaSettings
from taid_ray.models.head import Head, hidden_states
from taid_ray.models.hub import restoring_hub_mode
from taid_ray.models.image_isolation import check_images
from taid_ray.models.lengths import context_length
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.pair import check_models, model_configs, run_media, run_tokenizer, shared_vocabulary
from taid_ray.models.probes import long_probe, not_finite, probe_of
from taid_ray.models.processors import check_media
from taid_ray.models.self_test import explained_tests, tested_head
from taid_ray.run.metrics import perplexity
from taid_ray.student.generation import answers, placed
from taid_ray.student.rouge import check_rouge_score, conversations, exact_match, rouge_l
from taid_ray.student.seeing import seeing_batches, seeing_note
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.payload import TeacherOutput, divergence, row_means
from taid_ray.teacher.pictures import RowPictures

ROUGE_ROWS = 64
BATCH_ROWS = 8


@dataclass(frozen=True)
class Measurement:
    """Means over the loss positions, in nats, and optionally figures (0 to 1) of greedy answers."""

    cross_entropy: float
    teacher_cross_entropy: float
    kl: float
    tokens: int
    sequence_length: int
    answers: dict[str, tuple[float, float]]
    """By its name, the mean of a figure over the model's answers and over the teacher's; {} where none were asked for."""
    notes: tuple[str, ...] = ()
    """Sentences about the images: whether both models see them, and what may not be meant."""


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
    tokenizer, processor = run_tokenizer(config), run_media(config)
    num_shared = shared_vocabulary(config, teacher_config, student_config).num_shared
    images, notes = None, []
    if processor is not None:
        images = RunImages(processor)
        notes = check_media(config, processor, teacher_config, student_config, num_shared)
    source, media = config.data.sources[0], images.encoder_media if images else None
    rows = validation_rows(source, tokenizer, media=media)
    check_ids(rows, num_shared, tokenizer.get_vocab())
    models = MeasuredModels(config, num_shared, device, images)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(rows), BATCH_ROWS):
        sums += models.score(collate(rows[start : start + BATCH_ROWS]))
    if images is not None:
        notes += models.seeing(rows, images)
    answered = {}
    if rouge:
        documents = min(ROUGE_ROWS, config.data.valid_documents)
        answered = models.answers(tokenizer, *conversations(source, tokenizer, documents, media))
    student_ce, teacher_ce, kl, tokens = sums.tolist()
    length = config.data.sequence_length
    return Measurement(
        student_ce / tokens, teacher_ce / tokens, kl / tokens, int(tokens), length, answered, tuple(notes)
    )


class MeasuredModels:
    """The model to measure and its teacher, on one device, and what they are shown."""

    def __init__(self, config: DistillConfig, num_shared: int, device: torch.device, images: RunImages | None):
        """Loads and tests both. num_shared: ids that both have. images: in data with images, and only then.

        Raises ModelError if one of them cannot be used so.
        """
        self._config, self._device = config, device
        self._read = None if images is None else images.read
        self._pictures = None if images is None else Pictures(images.processor, images.read)
        self._student, head = load_student(config, device, images.processor if images else None)
        self._head = head.rows(num_shared)
        self._teacher = load_teacher(config, num_shared, device, images.processor.settings if images else None)

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Sums over the batch's loss positions, [student's cross-entropy, teacher's, KL, positions]."""
        hidden, head, teacher, device = self._hidden(batch), self._head, self._teacher, self._device
        shown = self._shown(batch)
        answer = teacher.score(batch.inputs, batch.loss_positions, batch.labels, shown)
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

    @torch.no_grad()
    def seeing(self, rows: Sequence[Row], images: RunImages) -> list[str]:
        """Says how far grey images change what each model predicts. Raises DataError if no row has an image."""
        student, teacher = [], []
        for batch, without in seeing_batches(rows, BATCH_ROWS, images.processor.grey, images.memory):
            shape, positions = batch.inputs["input_ids"].shape, batch.loss_positions
            change = divergence(self._head, self._hidden(batch), self._hidden(without))
            student += row_means(change, positions, shape)
            teacher += self._teacher.seeing(batch.inputs, positions, self._shown(batch), self._shown(without))
        least = self._config.data.sees_at_least
        return [seeing_note("model", student, least), seeing_note("teacher", teacher, least)]

    def answers(self, tokenizer: Any, samples: Sequence[Sample], stop_ids: Sequence[int]) -> dict[str, Any]:
        """Means of the figures of the greedy answers of model and teacher to the samples' prompts, by figure."""
        answered = [
            answers(each, tokenizer, samples, self._device, stop_ids, self._pictures)
            for each in (self._student, self._teacher.model)
        ]
        figures = {"ROUGE-L": rouge_l, "exact match": exact_match}
        return {name: tuple(statistics.fmean(figure(each)) for each in answered) for name, figure in figures.items()}

    def _shown(self, batch: Batch) -> RowPictures:
        """The batch's images as the teacher sees them."""
        return self._teacher.pictures(batch.images, self._read) if self._read is not None else ()

    def _hidden(self, batch: Batch) -> Tensor:
        """The hidden states [N, H] of the model to measure at the loss positions. Raises ModelError if they are not finite."""
        inputs = batch.inputs
        if self._pictures is not None:
            inputs = self._pictures.inputs(inputs, batch.images)
        inputs = placed(inputs, self._device, self._student.dtype)
        hidden = hidden_states(self._student, inputs).flatten(0, 1)[batch.loss_positions.to(self._device)]
        if not bool(torch.isfinite(hidden).all()):
            found = not_finite(hidden.dtype, "student")
            raise ModelError(f"student.model: its hidden states on these data are {found}")
        return hidden


def load_student(config: DistillConfig, device: torch.device, media: MediaProcessor | None = None) -> tuple[Any, Head]:
    """The model to measure and its head, tested like a student of a run. media: its processor, where it is shown images."""
    student, pack = config.student, config.data.pack
    dtype = None if "dtype" in student.model_fields_set else "auto"
    model = load_causal_lm(student, dtype=dtype, device=device, images=media is not None).to(device)
    head = tested_head(model, "student.model", pack, long_probe(device, config.data.sequence_length))
    if media is not None:
        with explained_tests(model, "student.model"):
            check_images(probe_of(model, head, "student"), media, pack)
    return model, head


def load_teacher(
    config: DistillConfig, num_shared: int, device: torch.device, media: MediaSettings | None = None
) -> TeacherModel:
    """The teacher. Raises ModelError if it cannot be given the rows that the student is given. media: as in TeacherModel."""
    teacher = TeacherModel(config.given_teacher, num_shared, device, media=media)
    if config.data.pack:
        teacher.info().require_packing()
    return teacher


def measurement_table(found: Measurement) -> Table:
    """One row for the model, one for its teacher."""
    table = Table(title=f"{found.tokens:,} tokens, in rows of at most {found.sequence_length}")
    for column in ("", "cross-entropy", "perplexity", "KL to the teacher", *found.answers):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    sides = (("model", found.cross_entropy, f"{found.kl:.4f}"), ("teacher", found.teacher_cross_entropy, "-"))
    for side, (name, cross_entropy, kl) in enumerate(sides):
        shown = [f"{figures[side]:.4f}" for figures in found.answers.values()]
        table.add_row(name, f"{cross_entropy:.4f}", f"{perplexity(cross_entropy):.2f}", kl, *shown)
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


def check_rouge(config: DistillConfig) -> None:
    """Raises ConfigError if the data have no responses, or the package rouge-score is missing."""
    if config.data.format == "text":
        raise ConfigError("--rouge needs prompts and responses; set format=chat or format=prompt_response (found text)")
    check_rouge_score("--rouge")
