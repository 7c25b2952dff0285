"""`taid-ray data`: a look at what a model will be trained on, and its preparation ahead of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from taid_ray.config.schema import load_config
from taid_ray.report.format import print_line

if TYPE_CHECKING:
    from taid_ray.data.preview import SamplePreview

app = typer.Typer(help="Look at the training data, or prepare them.", no_args_is_help=True)
LOSS_STYLE = "bold green"
LOSS_MARKS = "⟦", "⟧"
"""Around the text that carries loss, where there are no colours."""
MOST_CHARACTERS = 400
"""Of one part of a sample in a shortened view."""


@app.callback()
def options() -> None:
    """Look at the training data, or prepare them."""


@app.command()
def show(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted key=value pairs.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead.")] = False,
) -> None:
    """Show the first rows of the training data: what the model reads, and which of it carries loss.

    In the order of the data, before they are shuffled and packed. Only the tokenizer is loaded."""
    loaded = load_config(config, overrides or [])
    from taid_ray.driver.preflight import first_samples

    description, found = first_samples(loaded, rows)
    if as_json:
        print(json.dumps([each.to_dict() for each in found], ensure_ascii=False, indent=1))
        return
    console = Console()
    for line in description:
        print_line(console, line)
    print_samples(console, found)


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted key=value pairs.")] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Run directory, as for `train`: without data.store the encoded data go beside it."),
    ] = None,
) -> None:
    """Encode the training data into their store ahead of a run, on all CPUs of the cluster.

    Runs and searches on the same data find them there. What is interrupted goes on when the command is given again. Joins
    the Ray cluster that RAY_ADDRESS names, or starts one here."""
    loaded = load_config(config, overrides or [], {} if out is None else {"out": out})
    from taid_ray.driver.prepare import prepare_ahead

    prepared = prepare_ahead(loaded)
    several = len(prepared.sources) > 1
    names = (["source"] if several else []) + ["documents", "rows", "tokens", "tokens with loss", "rows of an epoch"]
    table = Table(*names, box=None, header_style="bold")
    for source, part, uses in zip(loaded.data.sources, prepared.sources, prepared.uses, strict=True):
        totals = part.opened.totals
        figures = (part.counts.documents, totals.rows, totals.tokens, totals.loss_tokens, uses)
        table.add_row(*([source.label] if several else []), *(f"{figure:,}" for figure in figures))
    Console().print(table)
    steps = max(1, prepared.rows // loaded.train.batch_size)
    print_line(Console(), f"an epoch has {prepared.rows:,} rows, {steps:,} steps of {loaded.train.batch_size}")


def print_samples(console: Console, samples: "Sequence[SamplePreview]", shorten: bool = False) -> None:
    """Prints samples, what carries loss in colour, or between marks where the console has no colours.

    shorten: leaves out the middle of long parts.
    """
    marks = ("", "") if console.color_system else LOSS_MARKS
    how = "in colour" if console.color_system else f"between {' and '.join(marks)}"
    print_line(console, f"what carries loss is {how}")
    for sample in samples:
        console.print()
        of = f" of {sample.source}" if sample.source else ""
        print_line(console, f"row {sample.row}{of}: {sample.tokens} tokens, {sample.loss_tokens} of them carry loss")
        text = Text()
        for part in sample.parts:
            shown = _visible(_shortened(part.text) if shorten else part.text)
            if part.has_loss:
                text.append(f"{marks[0]}{shown}{marks[1]}", LOSS_STYLE)
            else:
                text.append(shown)
        console.print(text, soft_wrap=True)
        for number, place in enumerate(sample.images, 1):
            print_line(console, f"image {number}: {_visible(place)}")


def _shortened(text: str) -> str:
    half = MOST_CHARACTERS // 2
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _visible(text: str) -> str:
    """Shows control characters as escapes, so that data cannot steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
