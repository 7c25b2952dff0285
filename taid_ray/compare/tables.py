"""Tables of a comparison: figures of every method, mean and spread over seeds, and verdicts on every pair."""

import statistics
from collections.abc import Sequence
from itertools import combinations

from rich.table import Table
from rich.text import Text

from taid_ray.compare.results import REFERENCE, Comparison, Figure
from taid_ray.compare.verdict import Verdict

NONE = "-"
NOISE = "noise"
Rows = list[list[str]]


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """Mean over seeds, and their standard deviation (of a sample) if there are several."""
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ±{statistics.stdev(values):{form}}"


def quality(comparison: Comparison) -> Rows:
    """The heading, a row per method, the best one first, and one for the teacher: the figures that judge a student."""
    return _rows(comparison, [figure for figure in comparison.figures if figure.low_is_good is not None])


def shape(comparison: Comparison) -> Rows:
    """The same for the masses of head and tail."""
    return _rows(comparison, [figure for figure in comparison.figures if figure.low_is_good is None])


def cost(comparison: Comparison) -> Rows:
    """The heading and a row per method: time of a step and memory, also relative to REFERENCE."""
    rows = [["method", "ms per step", f"time / {REFERENCE}", "MiB", f"memory / {REFERENCE}"]]
    for method in comparison.methods:
        times = [1000 * comparison.step_s(method, seed) for seed in comparison.seeds(method)]
        relative, memory = comparison.relative_time(method), comparison.relative_memory(method)
        rows.append(
            [
                method,
                mean_and_spread(times, ".1f"),
                mean_and_spread(relative, ".2f") if relative else NONE,
                f"{comparison.memory[method] / 2**20:,.0f}" if method in comparison.memory else NONE,
                NONE if memory is None else f"{memory:.2f}",
            ]
        )
    return rows


def pairs(comparison: Comparison, figure: Figure) -> list[tuple[str, str, Verdict]]:
    """The verdict on every pair of methods, the better mean first."""
    found = []
    for first, second in combinations(comparison.methods, 2):
        difference = comparison.verdict(first, second, figure).difference
        if difference > 0 if figure.low_is_good else difference < 0:
            first, second = second, first
        found.append((first, second, comparison.verdict(first, second, figure)))
    return found


def matrix(comparison: Comparison, figure: Figure) -> Rows:
    """The heading and a row per method: in the column of another one by how much it is better (+) or worse (-), or NOISE."""
    names = comparison.methods
    cells = {(name, name): "" for name in names}
    for first, second, verdict in pairs(comparison, figure):
        size = f"{abs(verdict.difference):{figure.form}}"
        cells[first, second] = NOISE if verdict.within_noise else f"+{size}"
        cells[second, first] = NOISE if verdict.within_noise else f"-{size}"
    return [["", *names], *([name, *(cells[name, other] for other in names)] for name in names)]


def sentence(first: str, second: str, verdict: Verdict, figure: Figure) -> str:
    """A verdict in words."""
    low, high = sorted((abs(verdict.low), abs(verdict.high)))
    size = f"{abs(verdict.difference):{figure.form}}"
    if verdict.within_noise:
        span = f"{verdict.low:+{figure.form}} to {verdict.high:+{figure.form}}"
        return f"{first} and {second}: within noise (difference {verdict.difference:+{figure.form}}, {span})"
    return f"{first} is better than {second} by {size} ({low:{figure.form}} to {high:{figure.form}})"


def shown(title: str, rows: Rows) -> Table:
    """A table for the terminal, with the first row of `rows` as its heading."""
    table = Table(title=title, box=None, pad_edge=False)
    for place, name in enumerate(rows[0]):
        table.add_column(Text(name), justify="left" if place == 0 else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def _rows(comparison: Comparison, figures: Sequence[Figure]) -> Rows:
    """The heading, the methods' rows, and the teacher's."""
    rows = [["method", *(figure.name for figure in figures)]]
    for method in comparison.methods:
        rows.append([method, *(mean_and_spread(comparison.values(method, each.key), each.form) for each in figures)])
    teacher = next(iter(comparison.evaluations.values())).teacher
    rows.append(["teacher", *(f"{teacher[f.key]:{f.form}}" if f.key in teacher else NONE for f in figures)])
    return rows
