"""The model card of a finished run, and the table of its validation that closes the terminal's output."""

from pathlib import Path
from typing import Any

from rich.table import Table

from taid_ray.config.data import DataConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.report.format import shown_name
from taid_ray.run.metrics import perplexity

CARD_FILE = "model/README.md"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

{origin}

| | |
|---|---|
{facts}

Validation, nats per token:

{figures}

The licences of {licences} apply.
"""


def result_table(summary: dict[str, Any]) -> Table:
    """A table of the teacher, if there is one, the student before and the student after. Nats per token; KL is
    KL(teacher || student)."""
    table = Table(title="Validation")
    for column in result_columns(summary):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for row in result_rows(summary):
        table.add_row(*row)
    return table


def result_columns(summary: dict[str, Any]) -> list[str]:
    """The heading of `result_table`."""
    return ["", "cross-entropy", "perplexity", *(["KL to the teacher"] if "teacher" in summary else []), "parameters"]


def result_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of `result_table`, as text."""
    rows: list[tuple[str, ...]] = []
    compared = "teacher" in summary
    for name, key in (("teacher", "teacher"), ("student before", "before"), ("student after", "after")):
        if key not in summary:
            continue
        figures = summary[key]
        cross_entropy, kl = figures["cross_entropy"], figures.get("kl")
        shown_kl = ("-" if kl is None else f"{kl:.4f}",) if compared else ()
        size = (
            f"{figures['parameters']:,}" if figures["parameters"] else "-"
        )  # unknown of a teacher that is only a file
        rows.append((name, f"{cross_entropy:.4f}", f"{perplexity(cross_entropy):.2f}", *shown_kl, size))
    return rows


def write_model_card(run_dir: Path, config: DistillConfig, summary: dict[str, Any]) -> None:
    """Writes RUN/model/README.md: what the model is, where it came from, and how it measured."""
    schedule, data, student, taid = config.schedule, config.data, config.student, config.loss.is_taid
    origin = {
        "pretrained": f"`{shown_name(str(student.model))}`",
        "scratch": "new weights",
        "cut": f"layers {student.layers} of the teacher",
    }[student.init]
    # Local paths say where files lay on one machine; their names are enough for a reader.
    loss = config.loss.shown
    if weight := config.loss.sft_weight:
        loss = f"{1 - weight:g} x {loss} + {weight:g} x cross-entropy on the labels"
    shown_schedule = "none: compares with the teacher itself throughout (t = 1)"
    if not config.learns_from_teacher:
        loss, shown_schedule = "cross-entropy on the labels", "none: learns from no teacher"
    if taid:
        shown_schedule = (
            f"{schedule.mode}, t {schedule.t_start} to {schedule.t_end} ({summary['t']:.3f} in the last step)"
        )
        if schedule.mode not in ("linear", "constant"):
            shown_schedule += f", alpha {schedule.alpha}"
        if schedule.mode in ("adaptive", "normalised"):
            shown_schedule += f", beta {schedule.beta}, signal {schedule.signal}"
        if schedule.mode == "normalised":
            shown_schedule += f", gain {schedule.gain:g}"
    trained = "all"
    if student.lora:
        trained = f"LoRA adapters (rank {student.lora.rank}, alpha {student.lora.alpha:g}), merged"
    facts = {
        "teacher": _teacher(config),
        "student before": origin,
        "data": _sources(data),
        "loss": loss,
        "schedule": shown_schedule,
        "weights trained": trained,
        "training": f"{summary['steps']} steps of {config.train.batch_size} rows, {summary['tokens']:,} loss tokens, "
        f"peak learning rate {config.train.learning_rate}",
    }
    columns = result_columns(summary)
    table = [columns, ["---", *["---:"] * (len(columns) - 1)], *result_rows(summary)]
    card = CARD.format(
        name=config.name,
        origin=_origin(config),
        tags=", ".join(_tags(config)),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        figures="\n".join(f"| {' | '.join(row)} |" for row in table),
        licences=f"{'the teacher, of ' if config.learns_from_teacher else ''}the student it started from and of the data",
    )
    (run_dir / CARD_FILE).write_text(card, encoding="utf-8")


def _sources(data: DataConfig) -> str:
    """Names the training data, with the share of each source in a mixture."""
    length = f"{data.sequence_length} tokens per row"
    if isinstance(data.train, str):
        return f"`{shown_name(data.train)}` ({data.format}, {length})"
    shares = [
        f"weight {given.weight:g}" if given.weight else f"{given.rows:,} rows of an epoch" if given.rows else "all rows"
        for given in data.train
    ]
    pairs = zip(data.sources, shares, strict=True)
    named = ", ".join(f"`{shown_name(source.train)}` ({source.format}, {share})" for source, share in pairs)
    return f"{named}; {length}"


def _origin(config: DistillConfig) -> str:
    if not config.learns_from_teacher:
        return "A model trained on the data below (supervised fine-tuning) by taid-ray."
    taid = "TAID (Temporally Adaptive Interpolated Distillation, arXiv 2501.16937)"
    return f"A student distilled with {taid if config.loss.is_taid else config.loss.name} by taid-ray."


def _tags(config: DistillConfig) -> list[str]:
    if not config.learns_from_teacher:
        return ["sft"]
    return ["distillation", "taid"] if config.loss.is_taid else ["distillation"]


def _teacher(config: DistillConfig) -> str:
    if config.teacher is None:
        return "none"
    return f"`{shown_name(config.teacher.model)}`{'' if config.learns_from_teacher else ' (in validations only)'}"
