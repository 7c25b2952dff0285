"""`taid-ray compare`: methods against each other on the same data, or under one teacher after another."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from taid_ray.config.schema import load_config
from taid_ray.errors import WorkerError
from taid_ray.report.format import print_line

if TYPE_CHECKING:
    from taid_ray.compare.gap import Gap
    from taid_ray.compare.results import Comparison


def compare(
    config: Annotated[Path, typer.Argument(help="YAML configuration that all runs start from.")],
    methods: Annotated[str, typer.Option(help="Methods to compare, for example sft,forward_kl,taid.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted key=value pairs, for example train.steps=500.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method, with other orders of the data.")] = 3,
    teachers: Annotated[
        str | None, typer.Option(help="Compare under each of these teachers, for example small,large.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="The comparison's directory (default: runs/NAME-comparison, or -gap).")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time (default: as many as the cluster has room for).")
    ] = None,
) -> None:
    """Compare methods under equal conditions: same data, order, steps and first weights, one teacher for all.

    The same command goes on with a comparison that was interrupted."""
    from taid_ray.compare.methods import check_comparable, comparison_space

    base, names = load_config(config, overrides or []), _listed(methods)
    check_comparable(base)
    comparison_space(base, names, seeds)  # before everything heavy is loaded
    console = Console()
    console.print("loading Ray, torch and transformers", highlight=False)
    if teachers is not None:
        from taid_ray.compare.gap import run_gap

        show_gap(run_gap(base, names, _listed(teachers), seeds, out, max_concurrent), console)
        return
    from taid_ray.compare.driver import run_compare

    show_comparison(run_compare(base, names, seeds, out, max_concurrent).comparison, console)


def show_comparison(comparison: "Comparison", console: Console) -> None:
    """Prints the tables and notes. Raises WorkerError if runs have not finished."""
    from taid_ray.compare import page, tables

    if comparison.evaluations:
        figure = comparison.judged[0]
        matrix = tables.matrix(comparison, figure)
        console.print(tables.shown("Quality: mean ± spread over seeds", tables.quality(comparison)))
        console.print(tables.shown("Mass of head and tail", tables.shape(comparison)))
        console.print(tables.shown("Cost: median step, and memory of training", tables.cost(comparison)))
        console.print(tables.shown(f"{figure.name}: the row is better (+) or worse (-) than the column", matrix))
        for note in page.notes(comparison):
            print_line(console, f"note: {note}")
    print_line(console, f"comparison directory: {comparison.path}")
    _check_whole(comparison)
    console.print(f"  {page.PAGE_FILE}  {page.JSON_FILE}  trials/NAME/ (runs)", highlight=False)


def show_gap(gap: "Gap", console: Console) -> None:
    """Prints the students' figures by teacher, and writes the report. Raises WorkerError if runs have not finished."""
    from taid_ray.compare import gap_page, tables
    from taid_ray.compare.gap import notes, table

    for comparison in gap.comparisons.values():
        _check_whole(comparison)
    console.print(tables.shown("Cross-entropy of the students by teacher (parameters)", table(gap)))
    for note in notes(gap):
        print_line(console, f"note: {note}")
    gap_page.write_gap_report(gap)
    print_line(console, f"directory: {gap.path}")
    console.print(f"  {gap_page.PAGE_FILE}  {gap_page.JSON_FILE}  N-TEACHER/ (comparisons)", highlight=False)


def _check_whole(comparison: "Comparison") -> None:
    if missing := [place for place in comparison.trials if place not in comparison.evaluations]:
        raise WorkerError(
            f"{len(missing)} of {len(comparison.trials)} runs did not finish; {comparison.path}/trials/*.error and *.log say "
            "why, and the same command tries them again"
        )


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]
