"""Pictures of a comparison: how validation fell, how far methods are from the best one, and how sure students are.

Without pyplot, which keeps figures alive and is not safe beside other threads.
"""

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator, NullFormatter

from taid_ray.compare.results import Comparison, Figure

CURVES = {"cross_entropy": "validation cross-entropy", "kl": "validation KL(p||q)"}
LEGEND_COLUMNS = 6
FEW = 10
"""Number of methods up to which each has a colour that is easily told from the others."""


def curves(comparison: Comparison) -> Picture:
    """Validation figures by step: mean over seeds, and the range of the seeds as a band."""
    picture = Picture(figsize=(11, 5), layout="constrained")
    for axes, (key, name) in zip(picture.subplots(1, 2), CURVES.items(), strict=True):
        for method in comparison.methods:
            runs = [comparison.trials[method, seed].validations for seed in comparison.seeds(method)]
            steps = [line["step"] for line in runs[0]]
            values = np.array([[line[key] for line in run] for run in runs if len(run) == len(steps)])
            axes.plot(steps, values.mean(0), label=method, linewidth=1.4, **_style(comparison, method))
            axes.fill_between(
                steps, values.min(0), values.max(0), alpha=0.15, linewidth=0, **_style(comparison, method)
            )
        axes.set(xlabel="optimizer step", ylabel=f"{name} (nats per token)", yscale="log")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(alpha=0.3)
    picture.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False)
    return picture


def differences(comparison: Comparison) -> Picture:
    """Differences from the method of the lowest cross-entropy, with the intervals of the verdicts."""
    figures = comparison.judged
    picture = Picture(figsize=(3.4 * len(figures) + 1.5, 0.35 * len(comparison.methods) + 1.8), layout="constrained")
    panels = picture.subplots(1, len(figures), sharey=True, squeeze=False)[0]
    for axes, figure in zip(panels, figures, strict=True):
        _draw_differences(axes, comparison, figure)
    panels[0].set_yticks(range(len(comparison.methods)), comparison.methods)
    panels[0].set_ylim(len(comparison.methods) - 0.5, -0.5)
    picture.suptitle(f"difference from {comparison.methods[0]}, with 95 % intervals; grey: within noise", fontsize=10)
    return picture


def reliability(comparison: Comparison) -> Picture:
    """Accuracy of the likeliest token by its probability, of each method's first seed; an honest model is on the diagonal."""
    picture = Picture(figsize=(7, 5.6), layout="constrained")
    axes = picture.subplots()
    axes.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1)
    for method in comparison.methods:
        bins = comparison.evaluations[method, comparison.seeds(method)[0]].calibration
        points = [each["confidence"] for each in bins], [each["accuracy"] for each in bins]
        axes.plot(*points, marker="o", markersize=3, linewidth=1.2, label=method, **_style(comparison, method))
    axes.set(xlabel="probability of the likeliest token", ylabel="how often it is right", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    picture.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return picture


def _draw_differences(axes: Axes, comparison: Comparison, figure: Figure) -> None:
    best, *others = comparison.methods
    axes.axvline(0, color="0.3", linewidth=1)
    for place, method in enumerate(others, start=1):
        verdict = comparison.verdict(method, best, figure)
        if math.isfinite(verdict.difference):
            color = "0.6" if verdict.within_noise else "#1f5fa8"
            axes.plot([verdict.low, verdict.high], [place, place], color=color, linewidth=2)
            axes.plot([verdict.difference], [place], marker="o", color=color, markersize=5)
    axes.set_title(figure.name, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(alpha=0.3)


def _style(comparison: Comparison, method: str) -> dict[str, Any]:
    """The colour of a method: the same in all pictures."""
    names = sorted(comparison.methods)
    few = len(names) <= FEW
    return {
        "color": colormaps["tab10" if few else "turbo"](
            names.index(method) if few else names.index(method) / len(names)
        )
    }
