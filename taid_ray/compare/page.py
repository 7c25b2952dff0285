"""The report of a comparison: comparison.html, a self-contained page, and comparison.json with the same figures."""

from typing import Any

from taid_ray.compare import plots
from taid_ray.compare.results import Comparison
from taid_ray.compare.tables import cost, matrix, pairs, quality, sentence, shape
from taid_ray.files import replace_text, write_json
from taid_ray.report.page import details_part, notes_part, page, picture_part, table_part

PAGE_FILE, JSON_FILE = "comparison.html", "comparison.json"
PICTURES = {
    "curves.png": (plots.curves, "How validation fell: mean over seeds, and their range"),
    "differences.png": (plots.differences, "How far the others are from the best method"),
    "reliability.png": (plots.reliability, "How sure the students are, and how often they are right"),
}


def write_report(comparison: Comparison) -> None:
    """Writes DIR/comparison.html, DIR/comparison.json and DIR/report/*.png, over those of an earlier call.

    Writes nothing if no student was evaluated. Raises RunError or OSError if they cannot be written.
    """
    if not comparison.evaluations:
        return
    write_json(comparison.path / JSON_FILE, as_json(comparison))
    directory = comparison.path / "report"
    directory.mkdir(exist_ok=True)
    pictures = [picture_part(title, draw(comparison), directory / name) for name, (draw, title) in PICTURES.items()]
    heading, *rows = quality(comparison)
    tables = [
        table_part("Quality: mean and spread over seeds, on the held-out documents", heading, rows, rows[0]),
        _table("Shape of the distributions: mass of head and tail", shape(comparison)),
        _table("Cost: median time of a step, and memory that training needs", cost(comparison)),
    ]
    verdicts = [
        _table(
            f"{figure.name}: by how much the row is better (+) or worse (-) than the column", matrix(comparison, figure)
        )
        for figure in comparison.judged
    ]
    texts = [
        details_part(
            f"{figure.name}: every pair with its interval",
            "\n".join(sentence(*pair, figure) for pair in pairs(comparison, figure)),
        )
        for figure in comparison.judged
    ]
    parts = [notes_part(notes(comparison)), *tables, *pictures, *verdicts, *texts]
    replace_text(comparison.path / PAGE_FILE, page(_title(comparison), _summary(comparison), parts))


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that the page shows, as numbers."""
    seeds = {method: comparison.seeds(method) for method in comparison.methods}
    return {
        "name": comparison.search.name,
        "methods": {
            method: {
                "seeds": seeds[method],
                **{figure.key: comparison.values(method, figure.key) for figure in comparison.figures},
                "step_s": [comparison.step_s(method, seed) for seed in seeds[method]],
                "memory_bytes": comparison.memory.get(method),
            }
            for method in comparison.methods
        },
        "teacher": next(iter(comparison.evaluations.values())).teacher,
        "teacher_tokens": comparison.teacher_tokens,
        "verdicts": [
            {
                "figure": figure.key,
                "better": first,
                "worse": second,
                "difference": verdict.difference,
                "interval": [verdict.low, verdict.high],
                "within_noise": verdict.within_noise,
            }
            for figure in comparison.judged
            for first, second, verdict in pairs(comparison, figure)
        ],
        "notes": notes(comparison),
    }


def notes(comparison: Comparison) -> list[str]:
    """Sentences about a comparison: what is missing, what the verdicts mean, what to distrust."""
    documents = {len(each.documents) for each in comparison.evaluations.values()}
    num_pairs = len(comparison.methods) * (len(comparison.methods) - 1) // 2
    seeds = {len(comparison.seeds(method)) for method in comparison.methods}
    found = [
        f"{trial.params['variant']} with seed {trial.params['train.seed']} has not finished ({trial.status}"
        f"{f': {trial.error}' if trial.error else ''}); it is left out."
        for place, trial in comparison.trials.items()
        if place not in comparison.evaluations
    ]
    if unequal := comparison.unequal_starts():
        found.append(f"With seed {unequal[0]} the methods did not begin with the same student: do not compare them.")
    found.append(
        "A verdict draws held-out documents and seeds anew, and says within noise where the 95 % interval of the difference "
        f"holds 0. Documents: {', '.join(map(str, documents))}."
    )
    if num_pairs > 1:
        found.append(
            f"Of {num_pairs} pairs, about {0.05 * num_pairs:.1f} would differ by chance if all methods were equal."
        )
    if 1 in seeds:
        found.append("With one seed verdicts are on documents only: how much another seed would change is not known.")
    found.append(
        f"The teacher computed {comparison.teacher_tokens:,} tokens for all {len(comparison.trials)} runs, which share its "
        "outputs."
    )
    return found


def _table(title: str, rows: list[list[str]]) -> str:
    return table_part(title, rows[0], rows[1:])


def _title(comparison: Comparison) -> str:
    return f"Comparison {comparison.path.absolute().name}"


def _summary(comparison: Comparison) -> str:
    best, figure = comparison.methods[0], comparison.judged[0]
    equal = [name for name in comparison.methods[1:] if comparison.verdict(best, name, figure).within_noise]
    tied = f"; within noise of it: {', '.join(equal)}" if equal else ""
    return f"{best} has the lowest cross-entropy{tied}."
