"""The picture of the fits to a mixture."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taid_ray.demo.mode_averaging import GRID, Demonstration, log_mixture

FORWARD, REVERSE, TAID = "#4c78a8", "#e45756", "#54a24b"
SHOWN_T = ((0.5, ":"), (1.0, (0, (4, 3))))
"""Values of t whose Gaussian is drawn, and how."""
LIMITS = (-15.0, 15.0)


def mode_averaging(found: Demonstration) -> Figure:
    """Left the densities, right TAID's mean and standard deviation on their way, beside those of the two divergences."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    densities, path = figure.subplots(1, 2)
    _draw_densities(densities, found)
    _draw_path(path, found)
    for axes in (densities, path):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", fontsize=9, frameon=False)
    return figure


def _draw_densities(axes: Axes, found: Demonstration) -> None:
    axes.fill_between(GRID, np.exp(log_mixture()), color="0.8", linewidth=0, label="mixture (teacher)")
    axes.plot(GRID, np.exp(found.forward_kl.log_density()), color=FORWARD, linewidth=2, label="forward KL")
    axes.plot(GRID, np.exp(found.reverse_kl.log_density()), color=REVERSE, linewidth=2, label="reverse KL")
    for t, style in SHOWN_T:
        density = np.exp(found.taid_at(t).log_density())
        axes.plot(GRID, density, color=TAID, linestyle=style, linewidth=2.2, label=f"TAID at t = {t:g}")
    axes.set(xlim=LIMITS, ylim=(0, None), xlabel="x", ylabel="density")


def _draw_path(axes: Axes, found: Demonstration) -> None:
    means = np.array([fitted.mean for fitted in found.taid])
    deviations = np.array([fitted.deviation for fitted in found.taid])
    axes.fill_between(
        found.t,
        means - deviations,
        means + deviations,
        color=TAID,
        alpha=0.2,
        linewidth=0,
        label="TAID, mean ± deviation",
    )
    axes.plot(found.t, means, color=TAID, linewidth=2)
    for name, fitted, colour in (("forward KL", found.forward_kl, FORWARD), ("reverse KL", found.reverse_kl, REVERSE)):
        for side, style in ((-1, "--"), (0, "-"), (1, "--")):
            level = fitted.mean + side * fitted.deviation
            axes.axhline(
                level,
                color=colour,
                linestyle=style,
                linewidth=1.2,
                label=None if side else f"{name} (dashed: ± deviation)",
            )
    axes.set(xlim=(0, 1), ylim=(-7, 9), xlabel="t", ylabel="x")
