"""The report of a comparison of teachers: gap.html, a self-contained page, and gap.json with the same figures."""

import statistics
from typing import Any

from matplotlib.figure import Figure as Picture

from taid_ray.compare.gap import CROSS_ENTROPY, Gap, notes, table
from taid_ray.files import replace_text, write_json
from taid_ray.report.page import notes_part, page, picture_part, table_part

PAGE_FILE, JSON_FILE, PICTURE_FILE = "gap.html", "gap.json", "gap.png"


def write_gap_report(gap: Gap) -> None:
    """Writes gap.html, gap.json and gap.png into the directory. Raises RunError or OSError if they cannot be written."""
    heading, *rows = table(gap)
    write_json(gap.path / JSON_FILE, as_json(gap))
    parts = [
        notes_part(notes(gap)),
        table_part("Cross-entropy of the students, mean and spread over seeds, by teacher (parameters)", heading, rows),
        picture_part("Students by the size of their teacher", draw(gap), gap.path / PICTURE_FILE),
    ]
    summary = "One student, several teachers. Each teacher's own comparison is in a directory beside this page."
    replace_text(gap.path / PAGE_FILE, page(f"Capacity gap {gap.path.name}", summary, parts))


def as_json(gap: Gap) -> dict[str, Any]:
    """Everything that the page shows, as numbers; students' figures by seed."""
    return {
        "teachers": {
            name: {"parameters": gap.parameters(name), CROSS_ENTROPY.key: gap.teacher_figure(name)}
            for name in gap.comparisons
        },
        "students": {
            method: {name: each.values(method, CROSS_ENTROPY.key) for name, each in gap.comparisons.items()}
            for method in gap.methods
        },
        "notes": notes(gap),
    }


def draw(gap: Gap) -> Picture:
    """Cross-entropy of the students over the teacher's parameters, with the standard deviation over seeds."""
    picture = Picture(figsize=(7.5, 5), layout="constrained")
    axes = picture.subplots()
    names = list(gap.comparisons)
    sizes = [gap.parameters(name) for name in names]
    for method in gap.methods:
        values = [gap.comparisons[name].values(method, CROSS_ENTROPY.key) for name in names]
        spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
        axes.errorbar(sizes, [statistics.fmean(each) for each in values], spread, label=method, marker="o", capsize=3)
    axes.set(xscale="log", xlabel="parameters of the teacher", ylabel="cross-entropy of the student (nats per token)")
    axes.set_xticks(sizes, [f"{name}\n{size:,}" for name, size in zip(names, sizes, strict=True)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    picture.legend(loc="outside lower center", ncols=4, frameon=False)
    return picture
