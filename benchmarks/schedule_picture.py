"""The picture in docs/schedule.md: how t and the adaptive rule's sigmoid answer to three made-up losses.

    python -m benchmarks.schedule_picture

Modes `adaptive` (the paper's) and `normalised` see the same losses, so only the rule differs; in a real run the loss would
depend on t as well. Writes docs/images/schedule.png and prints what it shows as a table.
"""

import random
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.common import MIN_WIDTH, ROOT
from taid_ray.config.objective import ScheduleConfig
from taid_ray.scheduler.schedule import ScheduleState, TAIDSchedule

PICTURE = ROOT / "docs" / "images" / "schedule.png"
STEPS = 1000
ALPHA_STEPS = 5.0
"""alpha times the steps: enough for t to leave its linear floor at half speed already."""
MODES = ("adaptive", "normalised")
COLOURS = {"fast": "tab:green", "slow": "tab:blue", "noise only": "tab:orange"}


@dataclass(frozen=True)
class Trace:
    """What a mode makes of one loss; every list has one entry per step."""

    t: list[float]
    sigmoid: list[float]
    """How large the adaptive step was, as a share of alpha (1 - t); also where the floor decided t."""
    floor_share: float
    """Share of the steps in which the linear floor decided t."""


def losses() -> dict[str, list[float]]:
    """Nats per token: learnt in two bursts with plateaus between, evenly, or not at all. Noise has a fixed seed."""
    noise = random.Random(0)

    def fast(n: int) -> float:
        return 4.0 - 1.2 * min(n, 150) / 150 - 0.8 * min(max(n - 500, 0), 150) / 150

    return {
        "fast": [fast(n) * (1 + 0.01 * noise.gauss(0, 1)) for n in range(STEPS)],
        "slow": [(4.0 - 2.0 * n / STEPS) * (1 + 0.01 * noise.gauss(0, 1)) for n in range(STEPS)],
        "noise only": [4.0 * (1 + 0.05 * noise.gauss(0, 1)) for n in range(STEPS)],
    }


def trace(mode: str, values: list[float], settings: ScheduleConfig) -> Trace:
    """Runs the schedule over a loss."""
    alpha = ALPHA_STEPS / STEPS
    settings = settings.model_copy(update={"alpha": alpha, "mode": mode})
    schedule = TAIDSchedule(settings, STEPS)
    # The same rule without a floor, only to see its step: t_end 1 and so many steps that the floor never moves.
    free = TAIDSchedule(settings.model_copy(update={"t_start": 0.0, "t_end": 1.0}), 10**12)
    states: list[ScheduleState] = []
    sigmoids: list[float] = []
    for value in values:
        states.append(schedule.update(value))
        before = free.state.t
        sigmoids.append((free.update(value).t - before) / (alpha * (1 - before)))
    sigmoids[0] = sigmoids[1]  # the first loss only gives the second something to be compared with
    return Trace([x.t for x in states], sigmoids, sum(x.floor_active for x in states) / STEPS)


def draw(curves: dict[str, list[float]], traces: dict[str, dict[str, Trace]], settings: ScheduleConfig) -> None:
    """Rows: loss, sigmoid, t; a column for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(9.5, 8), sharex=True, sharey="row", layout="constrained")
    for column, (mode, of_loss) in enumerate(traces.items()):
        top, middle, bottom = (row[column] for row in axes)
        for name, values in curves.items():
            style = {"color": COLOURS[name], "label": name, "linewidth": 1.4}
            top.plot(values, **style | {"linewidth": 0.7})
            middle.plot(of_loss[name].sigmoid, **style | {"linewidth": 0.9})
            bottom.plot(of_loss[name].t, **style)
        ramp = (settings.t_start, settings.t_end)
        bottom.plot((0, STEPS), ramp, color="gray", linestyle="--", linewidth=1, label="linear floor")
        top.set_title(f"mode: {mode}")
        bottom.set_xlabel("optimizer step")
        middle.set_ylim(0, 1)
    for row, label in zip(axes, ("loss (nats per token)", "sigmoid: speed of t", "interpolation t"), strict=True):
        row[0].set_ylabel(label)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[1][0].text(STEPS / 2, 0.56, "the three losses' lines lie on one another", ha="center")
    axes[2][0].legend(loc="lower right")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def main() -> None:
    settings, curves = ScheduleConfig(), losses()
    traces = {mode: {name: trace(mode, values, settings) for name, values in curves.items()} for mode in MODES}
    table = Table("mode", "loss", "sigmoid, least", "sigmoid, most", "t at 25%", "t at 50%", "t at 75%", "on the floor")
    for mode, of_loss in traces.items():
        for name, of in of_loss.items():
            ts = (f"{of.t[STEPS * quarter // 4]:.3f}" for quarter in (1, 2, 3))
            settled = of.sigmoid[STEPS // 20 :]  # the first few have hardly anything to average over
            table.add_row(mode, name, f"{min(settled):.3f}", f"{max(settled):.3f}", *ts, f"{of.floor_share:.0%}")
    console = Console(width=MIN_WIDTH)
    console.print(table)
    draw(curves, traces, settings)
    console.print(f"Wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
