"""`taid-ray demo`: what the divergences do where everything can be computed, without a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from taid_ray.report.format import print_line

if TYPE_CHECKING:
    from taid_ray.demo.mode_averaging import Demonstration

PICTURE = Path("taid-mode-averaging.png")
SHOWN_T = (0.25, 0.5, 0.55, 0.75, 1.0)
"""Values of t at which the table shows TAID's Gaussian."""

app = typer.Typer(help="Show what the divergences do, without a model.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """Show what the divergences do, without a model."""


@app.command("mode-averaging")
def mode_averaging_command(
    out: Annotated[Path, typer.Option(metavar="PNG", help="The picture.")] = PICTURE,
) -> None:
    """Fit one Gaussian to a mixture of three by forward KL, reverse KL and TAID.

    Forward KL covers all modes and the gaps between them, reverse KL
    picks one mode, and TAID goes from the second to the first while t
    goes from 0 to 1. It takes a second; all integrals are exact."""
    from taid_ray.demo.mode_averaging import demonstrate
    from taid_ray.demo.pictures import mode_averaging
    from taid_ray.report.picture_file import check_picture, write_picture

    check_picture(out)
    found = demonstrate()
    console = Console()
    console.print(_table(found))
    console.print("p: the mixture; q: the Gaussian; gaps: where p is below 1% of its peak", highlight=False)
    write_picture(mode_averaging(found), out)
    print_line(console, f"picture: {out}")


def _table(found: "Demonstration") -> Table:
    """Makes a table of the fits: Gaussian, divergences from the mixture (nats), probability where the mixture has hardly any."""
    from taid_ray.demo.mode_averaging import kl, log_mixture, share_in_gaps

    fits = [("forward KL", found.forward_kl), ("reverse KL", found.reverse_kl)]
    fits += [(f"TAID, t = {t:g}", found.taid_at(t)) for t in SHOWN_T]
    target = log_mixture()
    table = Table("q fitted by", box=None, header_style="bold")
    for name in ("mean", "deviation", "KL(p || q)", "KL(q || p)", "in the gaps"):
        table.add_column(name, justify="right")
    for name, fitted in fits:
        density = fitted.log_density()
        figures = (fitted.mean, fitted.deviation, kl(target, density), kl(density, target))
        table.add_row(name, *(f"{figure:.3f}" for figure in figures), f"{share_in_gaps(density):.1%}")
    return table
