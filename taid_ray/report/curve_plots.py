"""The picture of simulated curves of t, beside the real t of a run."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from taid_ray.report.history import History
from taid_ray.scheduler.curves import Curve

MOST_POINTS = 1000
"""Most points of a curve; more could not be told apart."""
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")
STYLES = ("-", (0, (5, 1.5)), "-.", ":")


def simulated_t(curves: Sequence[Curve], run: History | None) -> Figure:
    """t over the steps: a band for each alpha between its curves, the linear floor, and the run's t, if there is a run.

    curves: at least one, all with the same ramp.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    ramp = curves[0].ramp
    steps = np.unique(np.linspace(0, ramp.steps - 1, min(ramp.steps, MOST_POINTS)).round().astype(int))
    for place, alpha in enumerate(dict.fromkeys(curve.alpha for curve in curves)):
        _draw_band(axes, [curve for curve in curves if curve.alpha == alpha], steps, COLOURS[place % len(COLOURS)])
    floor = [min(ramp.t_end, ramp.floor(int(step))) for step in steps]
    axes.plot(steps, floor, color="0.2", linestyle="--", linewidth=1.2, label="linear floor")
    taken = [(curve.floor_step, curve.t[curve.floor_step]) for curve in curves if curve.floor_step is not None]
    if taken:
        axes.plot(*np.array(taken).T, "o", color="0.2", markersize=5, label="the floor takes over")
    if run is not None:
        # The t that a step used is the t after the step before it.
        axes.plot(np.arange(run.steps - 1), run["t"][1:], color="black", linewidth=2, label=f"run {run.path.name}")
    axes.set(xlabel="optimizer step, counted from 0", ylabel="interpolation t after the step", ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _draw_band(axes: Axes, curves: Sequence[Curve], steps: np.ndarray, colour: str) -> None:
    """The curves of one alpha, with the area between them."""
    values = np.array([[curve.t[step] for step in steps] for curve in curves])
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    for place, (curve, t) in enumerate(zip(curves, values, strict=True)):
        label = f"alpha {curve.alpha:g}, sigma {curve.sigma:g}"
        axes.plot(steps, t, color=colour, linestyle=STYLES[place % len(STYLES)], linewidth=1.5, label=label)
