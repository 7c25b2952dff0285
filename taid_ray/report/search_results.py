"""Results of a search, read from its files: all trials, how far each came, and which is the best.

DIR/search.yaml       config: the base configuration, space: what was searched
DIR/trials.json       name, params, status and error of every trial, in the order of their creation
DIR/trials/NAME/      the trial's run directory
"""

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from taid_ray.config.distribution import Distribution
from taid_ray.config.schema import DistillConfig, stored_config
from taid_ray.config.space import Space
from taid_ray.config.text import read_tree
from taid_ray.errors import ConfigError
from taid_ray.files import damaged, read_json, read_lines
from taid_ray.run.layout import (
    CONFIG_FILE,
    METRICS_FILE,
    SEARCH_FILE,
    SUMMARY_FILE,
    TRIALS,
    TRIALS_FILE,
    VALIDATION_FILE,
    TrialStatus,
)

METRIC_NAMES = {"kl": "validation KL", "cross_entropy": "validation cross-entropy"}
RANKED_STATUS: tuple[TrialStatus, ...] = ("finished", "running", "stopped", "failed", "waiting")


@dataclass(frozen=True)
class Trial:
    """One run of a search."""

    name: str
    params: dict[str, Any]
    """The searched keys with the values of this trial."""
    status: TrialStatus
    """`stopped` means by the search's scheduler, before its last step."""
    error: str
    """Cause of its failure; empty otherwise."""
    config: DistillConfig | None
    """Configuration of its run; None before that began, and if it ended before the first step."""
    total_steps: int | None
    """Number of steps of the whole run; None if that follows from train.epochs and the run has not ended."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    validations: list[dict[str, Any]]
    """Lines of validation.jsonl."""
    summary: dict[str, Any] | None
    """Content of summary.json; None until the run has finished."""

    def figure(self, metric: str) -> float | None:
        """`kl` or `cross_entropy` (nats per token) of the last validation; None before the first, and without a teacher the
        kl."""
        found = self.validations[-1].get(metric) if self.validations else None
        return None if found is None else float(found)

    @property
    def step(self) -> int:
        """Number of optimizer steps made."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def t(self) -> float | None:
        """Value of t that the last step used; None before the first, and with the loss `sft`."""
        found = self.metrics[-1].get("t") if self.metrics else None
        return None if found is None else float(found)


@dataclass(frozen=True)
class Search:
    """A search as its files tell it. Figures are comparable only between trials that finished."""

    path: Path
    name: str
    """Name in the base configuration."""
    space: Space
    trials: list[Trial]
    """In the order of their creation."""

    @property
    def metric(self) -> str:
        """Validation figure that is minimised: `kl` or `cross_entropy`."""
        return self.space.metric

    def ranked(self) -> list[Trial]:
        """Trials in order of rank: finished ones by figure, then the others by status, the farthest first, then by figure."""
        return sorted(self.trials, key=self._rank)

    def finished(self) -> list[Trial]:
        """The finished trials with a finite figure, the best first."""
        ranked = self.ranked()
        return [trial for trial in ranked if trial.status == "finished" and math.isfinite(self.value(trial))]

    def best(self) -> Trial | None:
        """The finished trial with the lowest figure; None until one has finished."""
        return next(iter(self.finished()), None)

    def value(self, trial: Trial) -> float:
        """The trial's figure as a number to compare: infinite if it has none, or one that is not a number."""
        figure = trial.figure(self.metric)
        return math.inf if figure is None or math.isnan(figure) else figure

    def _rank(self, trial: Trial) -> tuple[int, int, float, str]:
        steps = 0 if trial.status == "finished" else -trial.step
        return RANKED_STATUS.index(trial.status), steps, self.value(trial), trial.name


def read_search(path: Path, last_lines: bool = False) -> Search:
    """Reads a search's directory, also while it goes on.

    last_lines: of metrics and validations only the newest line, which is all that a live table shows.
    Raises ConfigError if this is no such directory, RunError if a file in it is damaged.
    """
    if not (path / SEARCH_FILE).is_file():
        raise ConfigError(
            f"{path} is not the directory of a search: it holds no {SEARCH_FILE}; name what `taid-ray tune` was given as --out"
        )
    content = read_tree(path / SEARCH_FILE)
    try:
        name, space = str(content["config"]["name"]), Space.model_validate(content["space"])
    except (KeyError, TypeError, ValidationError) as error:
        raise damaged(
            path / SEARCH_FILE, f"it does not hold config and space ({textwrap.shorten(str(error), 200)})"
        ) from None
    trials = [_read_trial(path, entry, last_lines) for entry in _read_trials(path / TRIALS_FILE)]
    return Search(path, name, space, trials)


def _read_trials(path: Path) -> list[dict[str, Any]]:
    entries = read_json(path)
    if entries is None:  # the search has only begun
        return []
    if not isinstance(entries, list):
        raise damaged(path, "it holds no list of trials")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not {"name", "params", "status"} <= entry.keys():
            raise damaged(path, f"entry {number} has not the keys name, params and status")
        if entry["status"] not in get_args(TrialStatus):
            raise damaged(path, f"trial {entry['name']} has the unknown status {entry['status']!r}")
    return entries


def _read_trial(path: Path, entry: Mapping[str, Any], last_lines: bool) -> Trial:
    run = path / TRIALS / entry["name"]
    config, summary = _read_config(run / CONFIG_FILE), read_json(run / SUMMARY_FILE)
    steps = config.train.steps if config else None
    last = 1 if last_lines else None
    metrics, validations = (read_lines(run / name, last) for name in (METRICS_FILE, VALIDATION_FILE))
    return Trial(
        entry["name"],
        entry["params"],
        entry["status"],
        entry.get("error") or "",
        config,
        summary["steps"] if summary else steps,
        metrics,
        validations,
        summary,
    )


def _read_config(path: Path) -> DistillConfig | None:
    try:
        return _built_config(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise damaged(path, str(error)) from error


@lru_cache(maxsize=4096)
def _built_config(path: Path, modified: int) -> DistillConfig:
    """Parses a configuration once per version of its file, for a live table asks every few seconds."""
    return stored_config(yaml.safe_load(path.read_text(encoding="utf-8")))


def bounds(distribution: Distribution) -> tuple[float, float]:
    """Lowest and highest value of a searched key; (0, 0), which is no range, for a choice from other things than numbers."""
    numbers = [float(value) for value in distribution.ends if is_number(value)]
    return (min(numbers), max(numbers)) if len(numbers) == len(distribution.ends) else (0.0, 0.0)


def position(value: float, low: float, high: float, log: bool) -> float:
    """Place of a value on a scale from low (0) to high (1)."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
