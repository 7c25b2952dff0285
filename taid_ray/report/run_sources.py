"""The sources of a mixture in the report of a run: how well the student does on each."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from taid_ray.report.history import History
from taid_ray.report.run_plots import FEW, MOST_POINTS, Bins, finish, log_if_wide, panels

LATEST = 100
"""Steps over which a loss at the end is averaged; a tenth of the run if that is less."""
TRAINED = {"loss": "loss at the end", "kl": "of it divergence"}
VALIDATED = {"cross_entropy": "cross-entropy", "kl": "KL to the teacher"}
"""Figures of a source, of the last steps and of the last validation, and what they are called."""


def latest_steps(history: History) -> int:
    """Number of the last steps, over which figures at the end of a run are averaged."""
    return max(1, min(LATEST, history.steps // 10))


def source_figures(history: History) -> tuple[list[str], list[str]]:
    """Names of the figures of a source, in metrics and in validations: those of a teacher only where there is one."""
    trained = [key for key in TRAINED if history.config.learns_from_teacher or key != "kl"]
    return trained, [key for key in VALIDATED if history.config.teacher or key != "kl"]


def source_heading(history: History) -> list[str]:
    """The heading of `source_rows`."""
    trained, validated = source_figures(history)
    return ["source", "", "loss tokens", *(TRAINED[key] for key in trained), *(VALIDATED[key] for key in validated)]


def source_rows(history: History) -> list[tuple[str, ...]]:
    """Rows for the sources: share of the tokens, losses over the last steps, and what the last validation says of each."""
    last = slice(-latest_steps(history), None)
    in_training, in_validation = source_figures(history)
    validated = history.validations[-1].get("sources", {}) if history.validations else {}
    whole = history["tokens"].sum()
    rows = []
    for name, columns in history.sources.items():
        tokens = columns["tokens"][last].sum()
        means = [(columns[key][last] * columns["tokens"][last]).sum() / tokens for key in in_training if tokens]
        figures = [validated[name][key] for key in in_validation] if name in validated else []
        shown = [f"{value:.4f}" for value in means] or ["-"] * len(in_training)
        share = columns["tokens"].sum()
        found = [f"{value:.4f}" for value in figures] or ["-"] * len(in_validation)
        rows.append((name, f"{share / whole:.1%}", f"{share:,.0f}", *shown, *found))
    return rows


def source_curves(history: History) -> Figure:
    """The training loss on each source and, where they are validated apart, its validation cross-entropy. Nats per token."""
    lines = [line for line in history.validations if line.get("sources")]
    figure, axes = panels(1 + bool(lines), 3.6)
    bins = Bins.of(history.steps, MOST_POINTS)
    marks: dict[str, Any] = {"marker": "o", "markersize": 3} if len(bins.starts) <= FEW else {}
    for number, (name, columns) in enumerate(history.sources.items()):
        tokens = bins.sum(columns["tokens"])
        there = tokens > 0
        means = bins.sum(columns["loss"] * columns["tokens"])[there] / tokens[there]
        axes[0].plot(bins.centres[there], means, color=f"C{number}", linewidth=1.2, label=name, **marks)
    axes[0].set(ylabel="training loss, nats per token")
    if lines:
        marks["marker"], marks["markersize"] = "o", 4 if len(lines) <= FEW else 1.5
        steps, every = [line["step"] for line in lines], []
        for number, name in enumerate(history.sources):
            values = [line["sources"][name]["cross_entropy"] for line in lines]
            every += values
            axes[1].plot(steps, values, color=f"C{number}", label=name, **marks)
            teacher = lines[0]["sources"][name].get("teacher_cross_entropy")
            if teacher is None:
                continue
            axes[1].axhline(teacher, color=f"C{number}", linestyle=":", linewidth=1.2, label=f"teacher on {name}")
        log_if_wide(axes[1], np.array(every))
        axes[1].set(ylabel="validation cross-entropy")
    finish(axes)
    return figure
