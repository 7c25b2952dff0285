"""The command `taid-ray report`: what a run did, as pictures and one page."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    run: Annotated[Path, typer.Argument(help="Run directory; its run may be finished, interrupted or still going on.")],
) -> None:
    """Draw a run: how t moved, loss, where the time went, and what to make of it, in RUN/report.html."""
    from taid_ray.report.format import print_line
    from taid_ray.report.run_page import write_run_report
    from taid_ray.run.layout import REPORT_FILE

    console = Console()
    for note in write_run_report(run):
        print_line(console, f"note: {note}")
    print_line(console, f"report: {run / REPORT_FILE}  (its pictures: {run / 'report'})")
