"""Totals of a run over all its attempts: what its summary is made of."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from taid_ray.data.encoding import Counts
from taid_ray.run.metrics import StepMetrics
from taid_ray.teacher.protocol import TeacherInfo


@dataclass(frozen=True)
class Evaluation:
    """Means over the loss positions of the validation rows, in nats."""

    cross_entropy: float
    tokens: int
    teacher_cross_entropy: float | None = None
    """None without a teacher, as `kl`."""
    kl: float | None = None
    """KL(teacher || student)."""
    seeing: float | None = None
    """How far grey images in place of their own change what the student predicts on the rows that `student.seeing` chose, of
    all sources: the median over them; None in a run without images."""
    sources: Mapping[str, "Evaluation"] = field(default_factory=dict)
    """Evaluations of the rows of each source, by its name, if there are several."""

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Evaluation":
        """Reads what `to_dict` gave; other keys are passed over."""
        sources = {name: cls.from_dict(part) for name, part in found.get("sources", {}).items()}
        return cls(**{key: found[key] for key in (*FIGURES, "tokens", "seeing") if key in found}, sources=sources)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures by their names: those of a teacher only if there is one, `sources` only if there are several."""
        figures = {key: value for key, value in asdict(self).items() if value is not None and key != "sources"}
        sources = {name: part.to_dict() for name, part in self.sources.items()}
        return figures | ({"sources": sources} if sources else {})


FIGURES = ("cross_entropy", "teacher_cross_entropy", "kl")
"""The means of an Evaluation."""


def together(parts: Mapping[str, Evaluation]) -> Evaluation:
    """The evaluation of the rows of all sources, every token with the same weight. parts: those of the sources, by name."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    tokens = sum(part.tokens for part in parts.values())
    known = [key for key in FIGURES if getattr(next(iter(parts.values())), key) is not None]
    means = {key: sum(getattr(part, key) * part.tokens for part in parts.values()) / tokens for key in known}
    return Evaluation(**means, tokens=tokens, sources=dict(parts))


@dataclass
class RunTotals:
    """Counts and validations of a run. All ranks keep them; those of rank 0 are saved and shown."""

    payload_error: float = 0.0
    validations: dict[int, Evaluation] = field(default_factory=dict)
    """Evaluations, by the step after which they were made."""
    tokens: int = 0
    payload_bytes: int = 0
    teacher_tokens: int = 0
    """Positions the teacher computed for earlier attempts, up to the checkpoint."""
    wall_s: float = 0.0
    """Seconds that earlier attempts worked, up to the checkpoint."""
    samples: int = 0
    t: float = 0.0
    """Interpolation used in the last step."""
    images: int = 0
    image_bytes: int = 0
    """Bytes of images that were sent to the teacher."""
    best: str | None = None
    """Name of the checkpoint with the best validation."""
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "RunTotals":
        """Reads what `state` gave, on the way through JSON."""
        validations = {found["step"]: Evaluation.from_dict(found) for found in state["validations"]}
        return cls(**{**state, "validations": validations})

    def state(self, teacher_tokens: int) -> dict[str, Any]:
        """Content for a checkpoint. teacher_tokens: of this attempt, over all ranks."""
        return {
            "payload_error": self.payload_error,
            "validations": self.validation_lines(),
            "tokens": self.tokens,
            "payload_bytes": self.payload_bytes,
            "teacher_tokens": self.teacher_tokens + teacher_tokens,
            "wall_s": self.wall_s + time.monotonic() - self.started,
            "samples": self.samples,
            "t": self.t,
            "best": self.best,
            **self._of_images(),
        }

    def add(self, metrics: StepMetrics) -> None:
        """Counts a step."""
        self.tokens += metrics.tokens
        self.payload_bytes += metrics.payload_bytes
        self.samples, self.t = metrics.samples_seen, metrics.t
        self.images += metrics.images or 0
        self.image_bytes += metrics.image_bytes or 0

    def _of_images(self) -> dict[str, int]:
        """The numbers of images and of their bytes; none in a run without images."""
        return {"images": self.images, "image_bytes": self.image_bytes} if self.images else {}

    def is_best(self, step: int, figure: str) -> bool:
        """Tests whether the validation after `step` has the lowest `figure` of all so far."""
        lowest = min(self.validations, key=lambda other: (getattr(self.validations[other], figure), other))
        return step == lowest

    def summary(self, steps: int, parameters: int, counts: Counts, restarts: int) -> dict[str, Any]:
        """The content of summary.json, without what `of_teacher` adds. parameters: number of the student's. counts: of the
        data, by the last attempt."""

        def figures(found: Evaluation) -> dict[str, Any]:
            compared = {} if found.kl is None else {"kl": found.kl}
            return {"cross_entropy": found.cross_entropy, **compared, "parameters": parameters}

        return {
            "steps": steps,
            "before": figures(self.validations[0]),
            "after": figures(self.validations[steps]),
            "validations": self.validation_lines(),
            "tokens": self.tokens,
            "samples": self.samples,
            "wall_s": self.wall_s + time.monotonic() - self.started,
            "documents_read": counts.documents,
            "dropped_documents": counts.dropped,
            "truncated_documents": counts.truncated,
            "restarts": restarts,
            **self._of_images(),
        }

    def of_teacher(self, teacher: TeacherInfo, teacher_tokens: int, learns_from_teacher: bool) -> dict[str, Any]:
        """Figures of the teacher for summary.json. teacher_tokens: of this attempt, over all ranks. learns_from_teacher: False
        if it was asked in validations only."""
        trained = {"t": self.t, "payload_bytes": self.payload_bytes} if learns_from_teacher else {}
        return {
            "teacher": {
                "cross_entropy": self.validations[0].teacher_cross_entropy,
                "parameters": teacher.num_parameters,
            },
            **trained,
            "teacher_tokens": self.teacher_tokens + teacher_tokens,
            "payload_error": self.payload_error,
            "dropped_teacher_mass": teacher.dropped_mass,
        }

    def validation_lines(self) -> list[dict[str, Any]]:
        """The lines of validation.jsonl, in the order of their steps."""
        return [validation_line(step, evaluation) for step, evaluation in sorted(self.validations.items())]


def validation_line(step: int, evaluation: Evaluation) -> dict[str, Any]:
    """The line of validation.jsonl for the evaluation after `step`."""
    return {"step": step} | evaluation.to_dict()
