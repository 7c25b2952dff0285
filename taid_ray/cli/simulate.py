"""The command `taid-ray simulate`: the course of t for values of alpha and of the sigmoid, without a run."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from taid_ray.errors import ConfigError
from taid_ray.report.format import print_line
from taid_ray.report.history import History, read_history
from taid_ray.scheduler.curves import Curve, Ramp, simulate

ALPHAS, SIGMAS, STEPS, MOST_STEPS = "5e-3,1e-3,5e-4", "0.5,1", 12_000, 1_000_000
PICTURE = Path("taid-t-curves.png")
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Parts of the run at whose ends the table shows t."""


def simulate_command(
    alpha: Annotated[
        str | None, typer.Option(help=f"Step sizes, with commas between. Default: {ALPHAS}, or the run's.")
    ] = None,
    sigma: Annotated[
        str, typer.Option(help="Values of the sigmoid, through which the loss acts: 0.5 where it stands still.")
    ] = SIGMAS,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_STEPS, help=f"Optimizer steps of the run. Default: {STEPS}, or the run's."),
    ] = None,
    t_start: Annotated[float | None, typer.Option(help="Where t begins. Default: 0, or the run's.")] = None,
    t_end: Annotated[float | None, typer.Option(help="Where t ends. Default: 1, or the run's.")] = None,
    floor_from: Annotated[
        float | None, typer.Option(metavar="T", help="Where the linear floor begins. Default: --t-start.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help=f"The picture. Default: {PICTURE}; none with --json.")
    ] = None,
    as_json: Annotated[
        str | None,
        typer.Option("--json", metavar="STEP,STEP,...", help="Print t after these steps, counted from 0, as JSON."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="Run directory whose real t is drawn over the curves.")
    ] = None,
) -> None:
    """Draw how t would move: t = min(t_end, max(floor, t + alpha sigma (1 - t))), step by step, for each alpha and sigma.

    Prints t beside its closed form, 1 - (1 - t_start)(1 - alpha sigma)^(step + 1), and where the linear floor takes over."""
    history = None if run is None else _run_with_t(run)
    ramp = _ramp(history, steps, t_start, t_end, floor_from)
    if alpha is None:
        alpha = ALPHAS if history is None else str(history.config.schedule.alpha)
    alphas = _shares("--alpha", alpha)
    sigmas = _shares("--sigma", sigma)
    from taid_ray.report.picture_file import check_picture, write_picture

    wanted = None if as_json is None else _steps(as_json, ramp)
    picture = out or (PICTURE if wanted is None else None)
    if picture:
        check_picture(picture)
    curves = [simulate(each, of, ramp) for each in alphas for of in sigmas]
    if wanted is None:
        Console().print(_table(curves, history))
    else:
        print(json.dumps(_values(curves, wanted), indent=1))
    if picture:
        from taid_ray.report.curve_plots import simulated_t

        write_picture(simulated_t(curves, history), picture)
        print_line(Console(stderr=wanted is not None), f"picture: {picture}")


def _run_with_t(path: Path) -> History:
    history = read_history(path)
    if not history.config.loss.is_taid:
        raise ConfigError(
            f"--from {path}: the run's loss.name is {history.config.loss.name}, which has no t to draw; name a run of taid"
        )
    return history


def _ramp(
    run: History | None, steps: int | None, t_start: float | None, t_end: float | None, floor_from: float | None
) -> Ramp:
    """The settings that all curves share: those given, else those of the run, else the defaults."""
    if run is not None:
        steps = steps or run.total_steps
        t_start = run.config.schedule.t_start if t_start is None else t_start
        t_end = run.config.schedule.t_end if t_end is None else t_end
        if steps is None:
            raise ConfigError(
                f"--from {run.path}: how many steps train.epochs makes is known once the run has ended; give --steps"
            )
        if steps > MOST_STEPS:
            raise ConfigError(f"--from {run.path}: the run has {steps:,} steps; give --steps, at most {MOST_STEPS:,}")
    start, end = t_start or 0.0, 1.0 if t_end is None else t_end
    for option, value in (("--t-start", start), ("--t-end", end), ("--floor-from", floor_from or 0.0)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{option}: t lies within 0 and 1 (found {value:g})")
    for option, value in (("--t-start", start), ("--floor-from", floor_from or 0.0)):
        if value > end:
            raise ConfigError(f"{option}: {value:g} is above --t-end {end:g}, and t does not fall; lower it")
    return Ramp(steps or STEPS, start, end, start if floor_from is None else floor_from)


def _shares(option: str, text: str) -> list[float]:
    """The different numbers of an option that lists them. Raises ConfigError for any that is not above 0 and at most 1."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option}: give numbers with commas between, such as 0.5,1 (found {text!r})") from None
    for value in values:
        if not 0 < value <= 1:
            raise ConfigError(f"{option}: each number lies above 0 and is at most 1 (found {value:g})")
    return list(dict.fromkeys(values))


def _steps(text: str, ramp: Ramp) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--json: give whole numbers with commas between, such as 0,99 (found {text!r})") from None
    for step in steps:
        if not 0 <= step < ramp.steps:
            raise ConfigError(
                f"--json: the {ramp.steps} steps are counted from 0 to {ramp.steps - 1} (found {step}); leave it out, or "
                "raise --steps"
            )
    return steps


def _values(curves: list[Curve], steps: list[int]) -> list[dict[str, float]]:
    return [
        {
            "alpha": curve.alpha,
            "sigma": curve.sigma,
            "step": step,
            "t": curve.t[step],
            "closed_form": curve.closed_form(step),
        }
        for curve in curves
        for step in steps
    ]


def _table(curves: list[Curve], run: History | None) -> Table:
    """t after some steps: for each curve by the recurrence and by the closed form, then the floor and the run."""
    ramp = curves[0].ramp
    steps = sorted({max(1, round(share * ramp.steps)) - 1 for share in SHARES})
    table = Table("alpha", "sigma", "floor from\nstep", "after step", box=None, header_style="bold")
    for step in steps:
        table.add_column(f"{step}", justify="right")
    for curve in curves:
        name = (f"{curve.alpha:g}", f"{curve.sigma:g}", "never" if curve.floor_step is None else f"{curve.floor_step}")
        table.add_row(*name, "t", *(f"{curve.t[step]:.4f}" for step in steps))
        table.add_row("", "", "", "closed form", *(f"{curve.closed_form(step):.4f}" for step in steps))
    table.add_row("", "", "", "floor", *(f"{min(ramp.t_end, ramp.floor(step)):.4f}" for step in steps))
    if run is not None:
        real = run["t"][1:]  # the t that a step used is the t after the step before it
        table.add_row("", "", "", "t of the run", *(f"{real[step]:.4f}" if step < len(real) else "-" for step in steps))
    return table
