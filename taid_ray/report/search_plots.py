"""Pictures of a search: what was tried and what came of it, how t moved, how the validation figure fell.

Finished trials are coloured by rank, from dark for the best ones to light; the best one of all is drawn on top in its own colour.
Without pyplot, which keeps figures alive and is not safe beside other threads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

from taid_ray.report.format import full_text, shown
from taid_ray.report.search_results import METRIC_NAMES, Search, Trial, bounds, is_number, position

BEST = "#d6336c"
KINDS = {
    "finished": ("finished (dark: better)", "0.8"),
    "stopped": ("stopped early", "0.6"),
    "failed": ("failed", "#c77700"),
    "running": ("not ended", "#7fb3d5"),
    "waiting": ("not ended", "#7fb3d5"),
}
"""Name and colour of trials that have no rank, by status."""
FEW = 8
"""Number of trials up to which the legend names each; of more it names the kinds."""
MANY_TICKS, MANY_NAMES = 8, 25
WIDE = 4.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


def parallel(search: Search) -> Figure:
    """One vertical axis per searched key and one for the figure, one line per trial."""
    scales = [key_scale(search, key) for key in search.space.space]
    figures = [search.value(trial) for trial in search.finished()]
    if figures:
        scales.append(Scale(METRIC_NAMES[search.metric], min(figures), max(figures), log=_is_wide(figures)))
    figure = Figure(figsize=(max(7.0, 1.5 * len(scales) + 2), 5.2), layout="constrained")
    axes = figure.subplots()
    for trial, style in reversed(_styles(search)):
        values = [trial.params.get(key) for key in search.space.space]
        if trial.status == "finished" and figures:
            values.append(search.value(trial))
        heights = [scale.height(value) for scale, value in zip(scales, values, strict=False)]
        axes.plot(range(len(heights)), heights, marker="o", markersize=3, **style)
    for place, scale in enumerate(scales):
        _draw_scale(axes, place, scale)
    axes.set(xlim=(-0.35, len(scales) - 0.45), ylim=(-0.03, 1.03), yticks=[], xticks=range(len(scales)))
    axes.set_xticklabels([_heading(scale.name) for scale in scales])
    axes.tick_params(axis="x", length=0, pad=10, labelsize=9)
    axes.spines[:].set_visible(False)
    _legend(figure, search)
    return figure


def t_curves(search: Search) -> Figure:
    """The t that each trial used, by optimizer step."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    _draw_curves(axes, search, lambda trial: trial.metrics, "t")
    axes.set(ylabel="interpolation t", ylim=(-0.02, 1.02))
    _legend(figure, search)
    return figure


def validation(search: Search) -> Figure:
    """The figure by optimizer step, and beside it those of the finished trials in order of rank, at a scale of their own."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    finished = bool(search.finished())
    axes = figure.subplots(1, 1 + finished, width_ratios=(3, 2)[: 1 + finished], squeeze=False)[0]
    name = f"{METRIC_NAMES[search.metric]} (nats per token)"
    _draw_curves(axes[0], search, lambda trial: trial.validations, search.metric, marker="o", markersize=3)
    axes[0].set_ylabel(name)
    lines = [line for trial in search.trials for line in trial.validations if search.metric in line]
    if _is_wide([line[search.metric] for line in lines]):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(float(value))))
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    teacher = next((line["teacher_cross_entropy"] for line in lines if "teacher_cross_entropy" in line), None)
    if teacher is not None and search.metric == "cross_entropy":
        axes[0].axhline(teacher, color="0.3", linestyle=":", linewidth=1.2)
        axes[0].annotate("teacher", (0, teacher), xytext=(0, 3), textcoords="offset points", fontsize=9, color="0.3")
    if finished:
        _draw_ranks(axes[1], search)
        axes[1].set(xlabel=f"{name}, finished trials", ylabel="trial, best first")
    _legend(figure, search)
    return figure


def _draw_ranks(axes: Axes, search: Search) -> None:
    finished = search.finished()
    for place, (trial, style) in enumerate(_styles(search)[: len(finished)]):
        axes.plot([search.value(trial)], [place], marker="o", linestyle="", color=style["color"])
    every = math.ceil(len(finished) / MANY_NAMES)
    axes.set_yticks(range(0, len(finished), every), [trial.name for trial in finished[::every]])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.invert_yaxis()
    axes.margins(y=0.05)
    axes.grid(alpha=0.3)


@dataclass(frozen=True)
class Scale:
    """One axis of the parallel plot: numbers from low to high, or the names of what there is to choose from."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[str, ...] = ()

    def height(self, value: Any) -> float:
        """0 at the bottom to 1 at the top; not a number, which leaves a gap, where there is no value."""
        if self.choices:
            text = full_text(value)
            return (self.choices.index(text) + 0.5) / len(self.choices) if text in self.choices else math.nan
        if not is_number(value):
            return math.nan
        return position(value, self.low, self.high, self.log) if self.low < self.high else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and labels: both ends, and round numbers between that keep clear of them."""
        if self.choices:
            return [(self.height(name), shown(name)) for name in self.choices]
        if self.low == self.high:
            return [(0.5, shown(self.low))]
        ticks = self._round_numbers(LogLocator(subs=(1, 2, 5)) if self.log else MaxNLocator(5))
        if len(ticks) > MANY_TICKS:  # over several decades
            ticks = self._round_numbers(LogLocator())
        return [(0.0, shown(self.low)), *ticks, (1.0, shown(self.high))]

    def _round_numbers(self, locator: Locator) -> list[tuple[float, str]]:
        values = [float(value) for value in locator.tick_values(self.low, self.high)]
        return [(self.height(value), shown(value)) for value in values if 0.07 < self.height(value) < 0.93]


def key_scale(search: Search, key: str) -> Scale:
    """The scale of a searched key, as wide as its range."""
    distribution = search.space.space[key]
    if distribution.kind == "choice":
        ordered = (
            sorted(distribution.arguments) if all(map(is_number, distribution.arguments)) else distribution.arguments
        )
        return Scale(key, choices=tuple(full_text(value) for value in ordered))
    return Scale(key, *bounds(distribution), log="log" in distribution.kind)


def _draw_scale(axes: Axes, place: int, scale: Scale) -> None:
    axes.plot([place, place], [0, 1], color="0.3", linewidth=1, zorder=1)
    for height, label in scale.ticks():
        axes.plot([place - 0.02, place + 0.02], [height, height], color="0.3", linewidth=1, zorder=1)
        axes.annotate(
            _plain(label),
            (place, height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
            zorder=6,
        )


def _draw_curves(
    axes: Axes, search: Search, lines: Callable[[Trial], Sequence[dict[str, Any]]], key: str, **marker: Any
) -> None:
    """Draws a curve per trial that has the figure; a cross marks the end of one that ended before its last step."""
    for trial, style in reversed(_styles(search)):
        found = [line for line in lines(trial) if key in line]
        axes.plot([line["step"] for line in found], [line[key] for line in found], **style, **marker)
        if found and trial.status in ("stopped", "failed"):
            axes.plot([found[-1]["step"]], [found[-1][key]], marker="x", color=style["color"], zorder=4)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=(1, 2, 5, 10)))
    axes.grid(alpha=0.3)


def _styles(search: Search) -> list[tuple[Trial, dict[str, Any]]]:
    """The trials in order of rank, each with the style of its line."""
    places = {trial.name: place for place, trial in enumerate(search.finished())}
    styles: list[tuple[Trial, dict[str, Any]]] = []
    for trial in search.ranked():
        place = places.get(trial.name)
        if place is None:
            style = {"color": KINDS[trial.status][1], "linestyle": "--", "linewidth": 1, "zorder": 2}
        elif place == 0:
            style = {"color": BEST, "linewidth": 2.5, "zorder": 5}
        else:
            style = {"color": colormaps["viridis"](0.9 * place / len(places)), "linewidth": 1.4, "zorder": 3}
        styles.append((trial, style))
    return styles


def _legend(figure: Figure, search: Search) -> None:
    """Adds a legend: an entry per trial if they are few, else one for the best and one per kind."""
    entries: dict[str, dict[str, Any]] = {}
    few, finished = len(search.trials) <= FEW, [trial.name for trial in search.finished()]
    for trial, style in _styles(search):
        best, ranked = trial.name in finished[:1], trial.name in finished
        what = KINDS[trial.status][0]
        if best or (ranked and few):
            what = f"{search.value(trial):.4f}{' (best)' if best else ''}"
        entries.setdefault(f"{trial.name}  {what}" if best or few else what, style)
    handles = [Line2D([], [], label=_plain(label), **style) for label, style in entries.items()]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)


def _heading(key: str) -> str:
    """A dotted key in lines that fit between two axes."""
    parts = "\n".join(key.replace(".", ".\n").replace(" ", "\n").split("\n")[-3:])
    return _plain("\n".join(part if len(part) <= 20 else f"{part[:18]}..." for part in parts.split("\n")))


def _plain(text: str) -> str:
    """Escapes what matplotlib would take for a formula."""
    return text.replace("$", r"\$")


def _is_wide(values: Sequence[float]) -> bool:
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > WIDE * min(finite)
