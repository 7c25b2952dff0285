"""The human side of a finished run: model card, plots, and the closing table."""

from pathlib import Path
from typing import Any

from rich.table import Table

from taid_ray.config.schema import DistillConfig
from taid_ray.files import read_metrics
from taid_ray.report.format import shown_name
from taid_ray.run.metrics import perplexity

COLUMNS = ("", "cross-entropy", "perplexity", "KL to the teacher", "parameters")
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

A student distilled with {method} by taid-ray.

| | |
|---|---|
{facts}

Validation, nats per token:

| | cross-entropy | perplexity | KL to the teacher | parameters |
|---|---:|---:|---:|---:|
{figures}

The licences of the teacher, of the student it started from and of the data apply.
"""


def result_table(summary: dict[str, Any]) -> Table:
    """Teacher, student before and student after, one row each. Nats per token; KL is KL(teacher || student)."""
    table = Table(title="Validation")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for row in result_rows(summary):
        table.add_row(*row)
    return table


def result_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of that table, as text."""
    rows: list[tuple[str, ...]] = []
    for name, key in (("teacher", "teacher"), ("student before", "before"), ("student after", "after")):
        figures = summary[key]
        cross_entropy, kl = figures["cross_entropy"], figures.get("kl")
        shown_kl = "-" if kl is None else f"{kl:.4f}"
        rows.append(
            (name, f"{cross_entropy:.4f}", f"{perplexity(cross_entropy):.2f}", shown_kl, f"{figures['parameters']:,}")
        )
    return rows


def write_plots(run_dir: Path) -> None:
    """RUN/report/training.png: the loss and its parts, t, gradient norm and learning rate by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(run_dir / "metrics.jsonl")
    steps = [line["step"] for line in lines]

    def series(key: str) -> list[float]:
        return [line[key] for line in lines]

    figure, (loss, schedule, optimizer) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    loss.plot(steps, series("loss"), label="loss (cross-entropy form)")
    loss.plot(steps, series("entropy_pt"), label="entropy of the target", alpha=0.7)
    loss.plot(steps, series("kl"), label="KL(target || student)")
    loss.set_ylabel("nats per token")
    schedule.plot(steps, series("t"), color="tab:green", label="t")
    schedule.set_ylim(-0.02, 1.02)
    schedule.set_ylabel("interpolation t")
    optimizer.plot(steps, series("grad_norm"), color="tab:red", label="gradient norm")
    optimizer.set_ylabel("gradient norm")
    optimizer.set_xlabel("optimizer step")
    rate = optimizer.twinx()
    rate.plot(steps, series("lr"), color="tab:gray", linestyle="--", label="learning rate")
    rate.set_ylabel("learning rate")
    for axis in (loss, schedule, optimizer):
        axis.grid(alpha=0.3)
    loss.legend(loc="best")
    optimizer.legend(handles=[*optimizer.lines, *rate.lines], loc="best")
    (run_dir / "report").mkdir(exist_ok=True)
    figure.savefig(run_dir / "report" / "training.png", dpi=110)
    plt.close(figure)


def write_model_card(run_dir: Path, config: DistillConfig, summary: dict[str, Any]) -> None:
    """RUN/model/README.md: what the model is, where it came from, and how it measured."""
    schedule, data, student, taid = config.schedule, config.data, config.student, config.loss.name == "taid"
    origin = {
        "pretrained": f"`{shown_name(str(student.model))}`",
        "scratch": "new weights",
        "cut": f"layers {student.layers} of the teacher",
    }[student.init]
    # Local paths say where files lay on one machine; their names are enough for a reader.
    loss: str = config.loss.name
    if weight := config.loss.sft_weight:
        loss = f"{1 - weight:g} x {loss} + {weight:g} x cross-entropy on the labels"
    shown_schedule = "none: compares with the teacher itself throughout (t = 1)"
    if taid:
        shown_schedule = (
            f"{schedule.mode}, t {schedule.t_start} to {schedule.t_end} ({summary['t']:.3f} in the last step)"
        )
        if schedule.mode in ("adaptive", "normalised"):
            shown_schedule += f", alpha {schedule.alpha}, beta {schedule.beta}, signal {schedule.signal}"
        if schedule.mode == "normalised":
            shown_schedule += f", gain {schedule.gain:g}"
    trained = "all"
    if student.lora:
        trained = f"LoRA adapters (rank {student.lora.rank}, alpha {student.lora.alpha:g}), merged"
    facts = {
        "teacher": f"`{shown_name(config.teacher.model)}`",
        "student before": origin,
        "data": f"`{shown_name(data.train)}` ({data.format}, {data.sequence_length} tokens per row)",
        "loss": loss,
        "schedule": shown_schedule,
        "weights trained": trained,
        "training": f"{summary['steps']} steps of {config.train.batch_size} rows, {summary['tokens']:,} loss tokens, "
        f"peak learning rate {config.train.learning_rate}",
    }
    card = CARD.format(
        name=config.name,
        method="TAID (Temporally Adaptive Interpolated Distillation, arXiv 2501.16937)" if taid else config.loss.name,
        tags="distillation, taid" if taid else "distillation",
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        figures="\n".join(f"| {' | '.join(row)} |" for row in result_rows(summary)),
    )
    (run_dir / "model" / "README.md").write_text(card, encoding="utf-8")
