"""Report of a search: the ranked table, the pictures, report.html, and best.yaml for `taid-ray train`."""

import json
from collections.abc import Sequence
from typing import Literal

import yaml
from rich.table import Table
from rich.text import Text

from taid_ray.files import replace_text
from taid_ray.report.format import shown
from taid_ray.report.page import details_part, notes_part, page, picture_part, table_part
from taid_ray.report.search_notes import search_notes
from taid_ray.report.search_plots import parallel, t_curves, validation
from taid_ray.report.search_results import METRIC_NAMES, Search, Trial
from taid_ray.run.layout import REPORT_FILE

BEST_FILE = "best.yaml"
PLOTS = {
    "parallel.png": (parallel, "What was tried: one line per trial, from its values to its figure"),
    "t_curves.png": (t_curves, "How t moved"),
    "validation.png": (validation, "How the validation figure fell, and where the finished trials ended"),
}
FIGURE_COLUMNS = ("trial", "status", "step", "t", "loss", "val KL", "val CE")
MUST_BREAK = 8  # characters of a heading


def trials_table(search: Search, rows: int | None = None) -> Table:
    """A table of the trials in order of rank, within 100 columns for up to four searched keys. Figures are nats per token.

    rows: how many to show at most; trials that are running are not left out for finished ones.
    """
    best, visible = search.best(), _most_telling(search, rows)
    table = Table(title=_counts(search), box=None, pad_edge=False)
    cells = [_cells(search, trial) for trial in visible]
    for place, name in enumerate((*FIGURE_COLUMNS, *_short_keys(search))):
        heading = name.replace("_", "_\n") if len(name) > MUST_BREAK else name
        figure = place < len(FIGURE_COLUMNS)  # where it gets too narrow, the values of the keys make room
        width = max((len(row[place]) for row in cells), default=0) if figure else None
        justify: Literal["left", "right"] = "left" if place < 2 else "right"
        table.add_column(Text(heading), justify=justify, no_wrap=figure, min_width=width, overflow="fold")
    for trial, row in zip(visible, cells, strict=True):
        table.add_row(*map(Text, row), style="bold green" if trial is best else None)
    if left := len(search.trials) - len(visible):
        table.caption = f"and {left} more"
    return table


def write_report(search: Search) -> None:
    """Writes DIR/best.yaml, if a trial has finished, DIR/report/*.png and DIR/report.html, over those of an earlier call.

    Raises RunError or OSError if they cannot be written.
    """
    space = yaml.safe_dump(search.space.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    texts = [details_part("The space", space)]
    if best := search.best():
        replace_text(search.path / BEST_FILE, best_text(search, best))
        texts.insert(0, details_part(BEST_FILE, best_text(search, best)))
    directory = search.path / "report"
    directory.mkdir(exist_ok=True)
    pictures = [picture_part(title, draw(search), directory / name) for name, (draw, title) in PLOTS.items()]
    replace_text(search.path / REPORT_FILE, _page(search, pictures, texts))


def best_text(search: Search, best: Trial) -> str:
    """The text of best.yaml: the best trial's configuration as that of a new run, with a name and directory of its own."""
    assert best.config is not None  # it finished
    tree = best.config.model_dump(mode="json", exclude={"out"})
    tree["name"] = f"{search.name}-best"
    params = "\n".join(f"#   {key}: {json.dumps(value)}" for key, value in best.params.items())
    head = (
        f"# The best of {len(search.finished())} finished trials, {METRIC_NAMES[search.metric]} {search.value(best):.6g}: "
        f"trial {best.name} of the search in\n# {search.path.absolute()}, with\n{params}\n"
        f"# `taid-ray train {BEST_FILE}` makes a new run with it, in runs/{tree['name']}.\n"
    )
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _counts(search: Search) -> str:
    statuses = [trial.status for trial in search.ranked()]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    return f"Trials by {METRIC_NAMES[search.metric]}: {counts or 'none yet'}"


def _most_telling(search: Search, rows: int | None) -> list[Trial]:
    ranked = search.ranked()
    wanted = {trial.name for trial in sorted(ranked, key=lambda trial: trial.status != "running")[:rows]}
    return [trial for trial in ranked if trial.name in wanted]


def _short_keys(search: Search) -> list[str]:
    """The last part of each searched key, or all of it where two end alike."""
    ends = [key.rpartition(".")[2] for key in search.space.space]
    return [end if ends.count(end) == 1 else key for key, end in zip(search.space.space, ends, strict=True)]


def _cells(search: Search, trial: Trial) -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        trial.name,
        trial.status,
        f"{trial.step}/{trial.total_steps or '?'}" if trial.config else "-",
        number(trial.t, 3),
        number(trial.metrics[-1]["loss"] if trial.metrics else None, 3),
        number(trial.figure("kl"), 4),
        number(trial.figure("cross_entropy"), 4),
        *(shown(trial.params[key]) if key in trial.params else "-" for key in search.space.space),
    ]


def _page(search: Search, pictures: Sequence[str], texts: Sequence[str]) -> str:
    best = search.best()
    summary = f"{_counts(search)}."
    if best is not None:
        params = ", ".join(f"{key} = {shown(value)}" for key, value in best.params.items())
        summary += f" The best is {best.name} with {search.value(best):.4f}: {params}."
    title, parts = f"Search {search.path.absolute().name}", [notes_part(search_notes(search)), _html_table(search)]
    return page(title, summary, [*parts, *pictures, *texts])


def _html_table(search: Search) -> str:
    best, ranked = search.best(), search.ranked()
    rows = [_cells(search, trial) for trial in ranked]
    marked = next((row for row, trial in zip(rows, ranked, strict=True) if trial is best), None)
    return table_part("Trials", (*FIGURE_COLUMNS, *search.space.space), rows, marked)
