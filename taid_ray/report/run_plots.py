"""The pictures of one run. Long runs are drawn as means over some steps each, with the range of a curve's values behind them.

Without pyplot, which keeps figures alive and is not safe beside other threads.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from taid_ray.report.format import shown
from taid_ray.report.history import History

MOST_POINTS, MOST_BARS = 1000, 200
"""Most points of a curve, and most bars of the breakdown of the steps' time; more could not be told apart."""
FEW = 40
"""Number of points up to which each is marked."""
WIDE = 5.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
OUTLIER = 2.5
"""Factor above the time of nearly all steps at which a time axis ends: the first step loads and waits."""
PHASE_COLOURS = {
    "forward_s": ("forward", "#4c78a8"),
    "loss_s": ("loss", "#72b7b2"),
    "backward_s": ("backward", "#9ecae9"),
    "optimizer_s": ("optimizer", "#54a24b"),
    "data_s": ("data", "#eeca3b"),
    "schedule_wait_s": ("wait for the scheduler", "#b279a2"),
    "teacher_wait_s": ("wait for the teacher", "#e45756"),
}
REST = ("other", "0.75")


@dataclass(frozen=True)
class Bins:
    """Groups of equal length of consecutive steps; a group is drawn as one point or bar."""

    starts: np.ndarray
    """Index of each group's first step."""
    count: int
    """Number of steps of all groups together."""

    @classmethod
    def of(cls, count: int, most: int) -> "Bins":
        """Groups of `count` steps, `most` groups at most."""
        return cls(np.arange(0, count, math.ceil(count / most)), count)

    @property
    def size(self) -> int:
        """Number of steps per group; the last one may have fewer."""
        return int(self.starts[1]) if len(self.starts) > 1 else self.count

    @property
    def edges(self) -> np.ndarray:
        """Boundaries on an axis of steps, which count from 1."""
        return np.append(self.starts, self.count) + 0.5

    @property
    def centres(self) -> np.ndarray:
        return (self.edges[1:] + self.edges[:-1]) / 2

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, self.starts)

    def mean(self, values: np.ndarray) -> np.ndarray:
        return self.sum(values) / np.diff(self.edges)

    def low(self, values: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(values, self.starts)

    def high(self, values: np.ndarray) -> np.ndarray:
        return np.maximum.reduceat(values, self.starts)


def t_curve(history: History) -> Figure:
    """The t that each step used, its linear floor, and where the floor decided."""
    figure, axes = panels(1, 4.2)
    bins = Bins.of(history.steps, MOST_POINTS)
    _curve(axes[0], bins, history["t"], "t", "#7cc47f", linewidth=3)
    floor = history.floor()
    if floor is not None:
        axes[0].plot(bins.centres, bins.mean(floor), color="0.2", linestyle="--", linewidth=1.2, label="linear floor")
    if history["floor_active"].any():
        decided = np.repeat(bins.mean(history["floor_active"]) > 0.5, 2)
        sides = np.column_stack((bins.edges[:-1], bins.edges[1:])).ravel()
        strip: dict[str, Any] = {
            "transform": axes[0].get_xaxis_transform(),
            "color": "0.35",
            "linewidth": 0,
            "alpha": 0.3,
        }
        axes[0].fill_between(sides, 0, 0.03, where=list(decided), label="the floor decided", **strip)
    axes[0].set(ylabel="interpolation t", ylim=(-0.03, 1.03))
    finish(axes)
    return figure


def loss_curves(history: History) -> Figure:
    """Training loss with its parts, and below the validations. Nats per token."""
    figure, axes = panels(1 + bool(history.validations), 3.6)
    bins = Bins.of(history.steps, MOST_POINTS)
    if not history.config.learns_from_teacher:
        _curve(axes[0], bins, history["loss"], "cross-entropy", "#1f77b4")
    else:
        _draw_divergence(axes[0], bins, history)
    axes[0].set(ylabel="training, nats per token")
    if history.validations:
        _draw_validations(axes[1], history)
    finish(axes)
    return figure


def _draw_divergence(axes: Axes, bins: Bins, history: History) -> None:
    loss = history.config.loss
    _curve(axes, bins, history["loss"], "loss (cross-entropy form)", "#1f77b4")
    entropy = "entropy of the target" if loss.is_taid else "loss - divergence"
    _curve(axes, bins, history["entropy_pt"], entropy, "#ff9f1c")
    divergence = f"divergence ({loss.shown})"
    if loss.is_taid:
        divergence = "KL(target || student)" if loss.name == "taid" else "KL(student || target)"
    _curve(axes, bins, history["kl"], divergence, "#2f7d32")


def step_time(history: History) -> Figure:
    """The time of the steps, phases stacked upon each other."""
    figure, axes = panels(1, 4.6)
    bins = Bins.of(history.steps, MOST_BARS)
    phases = [key for key in PHASE_COLOURS if key in history.phases]
    parts = [bins.mean(history[key]) for key in phases]
    # With several workers the parts may be more than the whole: teacher_wait_s is the longest of any worker.
    rest = np.maximum(bins.mean(history["step_s"]) - sum(parts), 0)
    bottom = np.zeros(len(bins.starts))
    named = [*(PHASE_COLOURS[key] for key in phases), REST]
    for (name, colour), part in zip(named, (*parts, rest), strict=True):
        axes[0].stairs(bottom + part, bins.edges, baseline=bottom, fill=True, color=colour, linewidth=0, label=name)
        bottom = bottom + part
    axes[0].set(ylabel=f"seconds per step{_averaged(bins)}")
    _limit(axes[0], bottom, bins)
    finish(axes)
    axes[0].margins(x=0)
    return figure


def throughput(history: History) -> Figure:
    """Loss positions per second, and the share of the time that the student waited for the teacher, if training asks one."""
    waits = "teacher_wait_s" in history.columns
    figure, axes = panels(1 + waits, 2.8)
    bins = Bins.of(history.steps, MOST_BARS)
    seconds = np.maximum(bins.sum(history["step_s"]), 1e-9)
    marks: dict[str, Any] = {"marker": "o", "markersize": 3} if len(bins.starts) <= FEW else {}
    axes[0].plot(bins.centres, bins.sum(history["tokens"]) / seconds, color="#4c78a8", label="throughput", **marks)
    axes[0].set(ylabel=f"loss tokens per second{_averaged(bins)}")
    _from_zero(axes[0])
    if waits:
        waiting = 100 * bins.sum(history["teacher_wait_s"]) / seconds
        label, colour = PHASE_COLOURS["teacher_wait_s"]
        axes[1].stairs(waiting, bins.edges, fill=True, color=colour, linewidth=0, label=label)
        axes[1].set(ylabel="% of the steps' time", ylim=(0, max(5.0, 1.05 * float(waiting.max()))))
    finish(axes)
    return figure


def optimizer(history: History) -> Figure:
    """Gradient norm before clipping, and the learning rate."""
    figure, axes = panels(2, 2.6)
    bins, clip = Bins.of(history.steps, MOST_POINTS), history.config.train.max_grad_norm
    _curve(axes[0], bins, history["grad_norm"], "gradient norm", "#c0392b")
    if clip:
        axes[0].axhline(clip, color="0.35", linestyle="--", linewidth=1.2, label="train.max_grad_norm")
    log_if_wide(axes[0], history["grad_norm"])
    axes[0].set(ylabel="gradient norm")
    _curve(axes[1], bins, history["lr"], "learning rate", "0.35")
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(float(value))))
    axes[1].set(ylabel="learning rate")
    _from_zero(axes[1])
    finish(axes)
    return figure


def _draw_validations(axes: Axes, history: History) -> None:
    def values(key: str) -> list[float]:
        return [float(line[key]) for line in history.validations]

    marks: dict[str, Any] = {"marker": "o", "markersize": 4 if len(history.validations) <= FEW else 1.5}
    steps, figures = values("step"), values("cross_entropy")
    axes.plot(steps, figures, color="#1f77b4", label="cross-entropy of the student", **marks)
    if history.config.teacher:
        teacher, kl = values("teacher_cross_entropy"), values("kl")
        axes.axhline(teacher[0], color="0.35", linestyle=":", linewidth=1.4, label="cross-entropy of the teacher")
        axes.plot(steps, kl, color="#2f7d32", label="KL(teacher || student)", **marks)
        figures = [*figures, *kl, *teacher]
    log_if_wide(axes, np.array(figures))
    axes.set(ylabel="validation, nats per token")


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels above each other. height: inches of each."""
    figure = Figure(figsize=(9, height * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _curve(axes: Axes, bins: Bins, values: np.ndarray, label: str, colour: str, linewidth: float = 1.5) -> None:
    marks: dict[str, Any] = {"marker": "o", "markersize": 3} if len(bins.starts) <= FEW else {}
    axes.plot(bins.centres, bins.mean(values), color=colour, linewidth=linewidth, label=label, **marks)
    if bins.size > 1:
        axes.fill_between(bins.centres, bins.low(values), bins.high(values), color=colour, alpha=0.2, linewidth=0)


def finish(axes: list[Axes]) -> None:
    """Adds grid, legends and the axis of steps to panels that share it."""
    for each in axes:
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
        columns = 4 if len(each.get_legend_handles_labels()[0]) > 4 else 3
        each.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9, frameon=False, borderaxespad=0.2
        )
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=(1, 2, 5, 10)))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _from_zero(axes: Axes) -> None:
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.08 * top if math.isfinite(top) and top > 0 else 1)


def _limit(axes: Axes, heights: np.ndarray, bins: Bins) -> None:
    """Cuts a few very slow steps off, which would flatten all others, and says so in the picture."""
    usual = float(np.quantile(heights, 0.95))
    over = heights > OUTLIER * usual
    axes.set_ylim(0, 1.05 * float(heights[~over].max()) or 1)
    if over.any():
        slowest = int(heights.argmax())
        steps = f"step {bins.starts[slowest] + 1:,}" if bins.size == 1 else f"around step {bins.centres[slowest]:,.0f}"
        text = f"{over.sum()} higher than shown, up to {heights[slowest]:.3g} s at {steps}"
        axes.annotate(
            text, (0.99, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=9, backgroundcolor="w"
        )


def log_if_wide(axes: Axes, values: np.ndarray) -> None:
    """Makes the vertical axis logarithmic if the values differ by more than the factor WIDE."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() <= 0 or finite.max() <= WIDE * finite.min():
        return
    axes.set_yscale("log")
    subs = (1, 2, 5) if finite.max() > 30 * finite.min() else (1, 1.5, 2, 3, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(float(value))))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _averaged(bins: Bins) -> str:
    return f"\n(mean of {bins.size:,} steps each)" if bins.size > 1 else ""
