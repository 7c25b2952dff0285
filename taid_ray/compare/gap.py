"""The capacity gap: the same student compared under one teacher after another, usually ever larger ones."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from taid_ray.compare.driver import run_compare
from taid_ray.compare.methods import check_comparable, comparison_space
from taid_ray.compare.results import FIGURES, Comparison, judge_evaluations
from taid_ray.compare.tables import Rows, mean_and_spread
from taid_ray.compare.verdict import Verdict
from taid_ray.config.schema import DistillConfig
from taid_ray.driver.preflight import prepare
from taid_ray.errors import ConfigError
from taid_ray.report.format import shown_name

CROSS_ENTROPY = FIGURES[0]


@dataclass(frozen=True)
class Gap:
    """Comparisons of the same methods with several teachers."""

    path: Path
    """Directory that holds those of the comparisons."""
    comparisons: dict[str, Comparison]
    """By the teacher's name, in the order in which teachers were given."""

    @property
    def methods(self) -> list[str]:
        """Methods that were evaluated with every teacher."""
        first, *others = self.comparisons.values()
        return [method for method in first.methods if all(method in other.methods for other in others)]

    def parameters(self, teacher: str) -> int:
        """Number of the teacher's parameters."""
        summaries = [trial.summary for trial in self.comparisons[teacher].search.trials if trial.summary]
        return int(summaries[0]["teacher"]["parameters"])

    def teacher_figure(self, teacher: str) -> float:
        """The teacher's own cross-entropy on the held-out documents."""
        return next(iter(self.comparisons[teacher].evaluations.values())).teacher["cross_entropy"]

    def change(self, method: str, before: str, after: str) -> Verdict:
        """Compares the method's students of two teachers in cross-entropy; below 0 where the second teacher's are better."""
        old, new = self.comparisons[before], self.comparisons[after]
        seeds = sorted({*old.seeds(method)} & {*new.seeds(method)})
        later, earlier = ([each.evaluations[method, seed] for seed in seeds] for each in (new, old))
        return judge_evaluations(later, earlier, CROSS_ENTROPY)


def run_gap(
    config: DistillConfig,
    methods: Sequence[str],
    teachers: Sequence[str],
    seeds: int = 3,
    out: str | Path | None = None,
    max_concurrent: int | None = None,
) -> Gap:
    """Runs a comparison with each teacher in place of the configuration's, and returns when all have ended.

    teachers: names or directories of models, usually in the order of their size. out: directory of all comparisons, by
    default runs/NAME-gap. The other arguments and errors are those of `run_compare`. Everything that can be known to be wrong
    with any of the teachers is refused before the first run.
    """
    path = Path(out or f"runs/{config.name}-gap").expanduser().absolute()
    configs = with_teachers(config, teachers)
    for each in configs.values():
        check_comparable(each)
        comparison_space(each, methods, seeds)
        prepare(each)
    found = {}
    for number, (name, each) in enumerate(configs.items(), start=1):
        found[name] = run_compare(each, methods, seeds, path / f"{number}-{name}", max_concurrent).comparison
    return Gap(path, found)


def with_teachers(config: DistillConfig, teachers: Sequence[str]) -> dict[str, DistillConfig]:
    """Makes a configuration for each teacher, by its short name. Raises ConfigError if the student would change with it."""
    student = config.student
    if student.init == "cut" or student.model is None:
        raise ConfigError(
            f"student.init: {student.init} makes the student out of the teacher, and --teachers compares teachers of one "
            "student; set student.model"
        )
    found: dict[str, DistillConfig] = {}
    for teacher in teachers:
        name = shown_name(teacher)
        if name in found:
            raise ConfigError(f"--teachers: two of them are called {name}; name their directories differently")
        section = config.given_teacher.model_copy(update={"model": teacher})
        found[name] = config.model_copy(update={"teacher": section})
    return found


def table(gap: Gap) -> Rows:
    """The heading, a row for the teachers themselves and one per method: cross-entropy under each teacher."""
    names = list(gap.comparisons)
    rows = [["", *(f"{name} ({gap.parameters(name):,})" for name in names)]]
    rows.append(["teacher itself", *(f"{gap.teacher_figure(name):{CROSS_ENTROPY.form}}" for name in names)])
    for method in gap.methods:
        found = (gap.comparisons[name].values(method, CROSS_ENTROPY.key) for name in names)
        rows.append([method, *(mean_and_spread(values, CROSS_ENTROPY.form) for values in found)])
    return rows


def notes(gap: Gap) -> list[str]:
    """Sentences: whether each teacher is better than the one before, and whether each method's students are."""
    said = []
    names = list(gap.comparisons)
    for before, after in pairwise(names):
        old, new = gap.teacher_figure(before), gap.teacher_figure(after)
        what = "better" if new < old else "NOT better"
        said.append(f"The teacher {after} is {what} than {before}: cross-entropy {new:.4f} and {old:.4f}.")
        said += [_told(method, before, after, gap.change(method, before, after)) for method in gap.methods]
    if len(names) > 2:
        said += [f"{method}: {_course(gap, method)}" for method in gap.methods]
    return said


def _told(method: str, before: str, after: str, change: Verdict) -> str:
    span = f"{change.difference:+.4f}, {change.low:+.4f} to {change.high:+.4f}"
    if change.within_noise:
        return f"{method}: students of {after} and {before} differ within noise ({span})."
    return (
        f"{method}: students of {after} are {'better' if change.difference < 0 else 'worse'} than of {before} ({span})."
    )


def _course(gap: Gap, method: str) -> str:
    """Says how the students fare from the first teacher to the last one."""
    names = list(gap.comparisons)
    means = [statistics.fmean(gap.comparisons[name].values(method, CROSS_ENTROPY.key)) for name in names]
    best = names[means.index(min(means))]
    if means == sorted(means, reverse=True):
        return "its students become better with every teacher."
    return (
        f"its students are best with {best}, and not with the last teacher."
        if best != names[-1]
        else ("its students are best with the last teacher, but did not become better with every one before.")
    )
