"""Results of a comparison, read from its directory: figures of every method and seed, and verdicts on pairs of methods.

DIR is the directory of a search (see report/search_results), and has besides

DIR/trials/NAME/evaluation.json   what was measured of the run's student, see Evaluation
DIR/memory.json                   bytes of memory by method
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from taid_ray.compare.evaluation import Evaluation
from taid_ray.compare.methods import SEED
from taid_ray.compare.verdict import UNKNOWN, Floats, Verdict, judge
from taid_ray.config.space import VARIANT
from taid_ray.errors import ConfigError
from taid_ray.files import damaged, read_json
from taid_ray.report.search_results import Search, Trial, read_search
from taid_ray.run.layout import TRIALS

EVALUATION_FILE, MEMORY_FILE = "evaluation.json", "memory.json"
REFERENCE = "sft"
"""Method that time and memory are given relative to."""


@dataclass(frozen=True)
class Figure:
    """A figure of a method, as tables show it."""

    key: str
    """Name in `Evaluation.mean`."""
    name: str
    form: str
    """How a value is written, as `format` takes it."""
    low_is_good: bool | None
    """None where neither high nor low is better."""


FIGURES = (
    Figure("cross_entropy", "cross-entropy", ".4f", True),
    Figure("forward_kl", "KL(p||q)", ".4f", True),
    Figure("reverse_kl", "KL(q||p)", ".4f", True),
    Figure("rouge_l", "ROUGE-L", ".4f", False),
    Figure("calibration_error", "ECE", ".4f", True),
    Figure("head_mass", "head", ".4f", None),
    Figure("tail_mass", "tail", ".1e", None),
    Figure("head_mass_of_the_mean", "head of mean", ".4f", None),
    Figure("tail_mass_of_the_mean", "tail of mean", ".1e", None),
)
JUDGED = tuple(figure for figure in FIGURES if figure.key in ("cross_entropy", "forward_kl", "reverse_kl", "rouge_l"))
"""Figures that documents have, and in which one method is better than another."""


@dataclass(frozen=True)
class Comparison:
    """A comparison as its files tell it; of methods and seeds only those that were evaluated."""

    path: Path
    search: Search
    evaluations: dict[tuple[str, int], Evaluation]
    """By method and seed."""
    memory: dict[str, int]
    """Bytes by method."""

    @cached_property
    def trials(self) -> dict[tuple[str, int], Trial]:
        """All runs by method and seed, also those that have not finished."""
        return {(trial.params[VARIANT], trial.params[SEED]): trial for trial in self.search.trials}

    @cached_property
    def methods(self) -> list[str]:
        """The methods that were evaluated, the one with the lowest cross-entropy first."""
        found = dict.fromkeys(method for method, _ in self.evaluations)
        return sorted(found, key=lambda method: statistics.fmean(self.values(method, "cross_entropy")))

    @cached_property
    def figures(self) -> list[Figure]:
        """The figures that there are."""
        return [figure for figure in FIGURES if all(figure.key in each.mean for each in self.evaluations.values())]

    def seeds(self, *methods: str) -> list[int]:
        """The seeds with which each of these methods was evaluated, ascending."""
        return sorted(
            set.intersection(*({seed for each, seed in self.evaluations if each == name} for name in methods))
        )

    def values(self, method: str, key: str) -> list[float]:
        """A figure of a method by seed."""
        return [self.evaluations[method, seed].mean[key] for seed in self.seeds(method)]

    def step_s(self, method: str, seed: int) -> float:
        """Median wall seconds of an optimizer step."""
        return statistics.median(line["step_s"] for line in self.trials[method, seed].metrics)

    def relative_time(self, method: str) -> list[float] | None:
        """Median time of a step divided by that of REFERENCE, by seed; None without that."""
        if REFERENCE not in self.methods:
            return None
        return [self.step_s(method, seed) / self.step_s(REFERENCE, seed) for seed in self.seeds(method, REFERENCE)]

    def relative_memory(self, method: str) -> float | None:
        """Memory divided by that of REFERENCE; None if either is not known."""
        if not self.memory.get(REFERENCE) or method not in self.memory:
            return None
        return self.memory[method] / self.memory[REFERENCE]

    @property
    def teacher_tokens(self) -> int:
        """Positions (rows x length) that the teacher computed for all finished runs, without their evaluations."""
        return sum(trial.summary["teacher_tokens"] for trial in self.search.trials if trial.summary)

    @cached_property
    def judged(self) -> list[Figure]:
        """Those of JUDGED that there are."""
        return [figure for figure in JUDGED if figure in self.figures]

    def verdict(self, first: str, second: str, figure: Figure) -> Verdict:
        """Compares two methods by a figure of `judged`, over the seeds that both have; see `judge`."""
        return self._verdicts[first, second, figure.key]

    @cached_property
    def _verdicts(self) -> dict[tuple[str, str, str], Verdict]:
        found = {}
        for figure in self.judged:
            for first, second in combinations(self.methods, 2):
                seeds = self.seeds(first, second)
                ours, others = ([self.evaluations[method, seed] for seed in seeds] for method in (first, second))
                verdict = judge_evaluations(ours, others, figure) if seeds else UNKNOWN
                found[first, second, figure.key], found[second, first, figure.key] = verdict, verdict.exchanged()
        return found

    def unequal_starts(self) -> list[int]:
        """The seeds whose methods did not begin with the same student, by its first validation."""
        begun = {place: trial.validations[0] for place, trial in self.trials.items() if trial.validations}
        first = {
            seed: [line["cross_entropy"] for (_, each), line in begun.items() if each == seed] for _, seed in begun
        }
        return [seed for seed, found in first.items() if max(found) - min(found) > 1e-4 * max(found)]


def judge_evaluations(first: Sequence[Evaluation], second: Sequence[Evaluation], figure: Figure) -> Verdict:
    """Compares evaluations of the same documents, one for each seed that both have, by a figure of JUDGED."""

    def by_document(evaluations: Sequence[Evaluation]) -> Floats:
        rouge = figure.key == "rouge_l"
        return np.array([each.rouge_l if rouge else each.by_document[figure.key] for each in evaluations])

    ours = by_document(first)
    weights = np.ones(ours.shape[1]) if figure.key == "rouge_l" else np.array(first[0].tokens, dtype=np.float64)
    return judge(ours, by_document(second), weights)


def read_comparison(path: Path) -> Comparison:
    """Reads the directory of a comparison. Raises ConfigError if it is none, RunError if a file in it is damaged."""
    search = read_search(path)
    if not all({VARIANT, SEED} <= trial.params.keys() for trial in search.trials):
        raise ConfigError(
            f"{path} is the directory of a search, and of no comparison; name what `taid-ray compare` made"
        )
    evaluations = {}
    for trial in search.trials:
        found = _read_evaluation(path / TRIALS / trial.name / EVALUATION_FILE)
        if found is not None:
            evaluations[trial.params[VARIANT], trial.params[SEED]] = found
    return Comparison(path, search, evaluations, read_json(path / MEMORY_FILE) or {})


def _read_evaluation(path: Path) -> Evaluation | None:
    found = read_json(path)
    try:
        return None if found is None else Evaluation(**found)
    except TypeError as error:
        raise damaged(path, f"it holds no evaluation ({error}); without the file it is made again") from None
