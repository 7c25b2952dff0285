"""Notes on a search, in plain sentences: which keys mattered, what chance explains as well, what to distrust."""

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from taid_ray.report.format import full_text, shown
from taid_ray.report.search_results import METRIC_NAMES, Search, bounds, is_number, position
from taid_ray.report.statistics import Chance, compare_groups, trends
from taid_ray.scheduler.schedule import adaptive_is_linear

MIN_TRIALS = 5
"""Finished trials from which something is said about keys: with fewer, no order of them would be surprising."""
LEVEL = 0.05
"""Probability of calling a key effective in a search whose keys all have no effect."""
EQUAL = 0.01
"""Relative difference within which figures are called equal."""
EDGE = 0.05
"""Share of a range, at either end, that is called its edge."""


def search_notes(search: Search) -> list[str]:
    """Sentences about a search, the most important ones first."""
    return [
        *_completeness(search),
        *_failures(search),
        *_sameness(search),
        *_effects(search),
        *_inactive_adaption(search),
        *_edges(search),
        *_seeds(search),
    ]


def _completeness(search: Search) -> list[str]:
    def named(status: str) -> list[str]:
        return [trial.name for trial in search.trials if trial.status == status]

    found = []
    if open_trials := [*named("running"), *named("waiting")]:
        found.append(f"The search is not complete: {_listed(open_trials)} to go.")
    if not search.finished():
        found.append("No trial has finished, so there is no best one and no best.yaml.")
    if stopped := named("stopped"):
        found.append(
            f"Stopped early by {search.space.scheduler}, so not compared at full length: "
            f"{_listed(stopped)}. These rank below every finished trial, by the step they reached."
        )
    return found


def _failures(search: Search) -> list[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for trial in search.trials:
        if trial.status == "failed":
            reasons[textwrap.shorten(trial.error, 300, placeholder=" ...") or "no reason is known"].append(trial.name)
    return [f"{_listed(names)} failed: {reason}" for reason, names in reasons.items()]


def _sameness(search: Search) -> list[str]:
    figures = [search.value(trial) for trial in search.finished()]
    if len(figures) < 2 or figures[-1] - figures[0] > EQUAL * figures[-1]:
        return []
    return [
        f"All {len(figures)} finished trials lie within {EQUAL:.0%} of each other ({METRIC_NAMES[search.metric]} "
        f"{figures[0]:.4f} to {figures[-1]:.4f}): nothing that was searched mattered much."
    ]


def _effects(search: Search) -> list[str]:
    trials, keys = search.finished(), list(search.space.space)
    if not trials:
        return []
    if len(trials) < MIN_TRIALS:
        return [
            f"Too few finished trials to say which key had an effect ({len(trials)}, at least {MIN_TRIALS} are needed)."
        ]
    return [sentence for key in keys if (sentence := _effect(search, key, len(keys)))]


def _effect(search: Search, key: str, num_keys: int) -> str:
    """A sentence on a key's effect; empty if all trials had the same value, or the same figure.

    Each p is taken times the number of questions asked (Bonferroni), because so many times chance could have answered.
    """
    trials = [trial for trial in search.finished() if key in trial.params]
    values = [trial.params[key] for trial in trials]
    figures = np.array([search.value(trial) for trial in trials])
    if len({full_text(value) for value in values}) < 2 or np.ptp(figures) == 0:
        return ""
    numbers = all(is_number(value) for value in values)
    effect, measured, chance = (_trend if numbers else _difference)(key, values, figures, METRIC_NAMES[search.metric])
    measured = f"{measured}; {len(trials)} finished trials"
    p, least_p = (min(1.0, value * num_keys) for value in chance)
    if p <= LEVEL:
        return f"{effect} ({measured}, p = {p:.2g})."
    if least_p > LEVEL:
        return f"{key}: too few trials to show even the clearest effect ({measured})."
    return f"{key} had no effect that could be seen: all within noise ({measured}, p = {p:.2g})."


def _trend(key: str, values: Sequence[float], figures: np.ndarray, metric: str) -> tuple[str, str, Chance]:
    """Tests whether the figure rises or falls with a number, or bends: lower, or higher, in the middle than at both ends."""
    slope, bend = trends(values, figures)
    measured = f"Spearman rho {slope.rho:+.2f}, bend {bend.rho:+.2f}"
    clearer = min(slope, bend, key=lambda trend: trend.chance.p)
    chance = Chance(2 * clearer.chance.p, 2 * min(slope.chance.least_p, bend.chance.least_p))  # two questions
    if clearer is slope:
        return f"Higher {key} went with {'higher' if slope.rho > 0 else 'lower'} {metric}", measured, chance
    best = shown(float(np.median(np.array(values)[np.argsort(figures)[: max(1, len(values) // 4)]])))
    where = f"lowest at middle values of {key}, around {best}" if bend.rho > 0 else f"highest at middle values of {key}"
    return f"The {metric} was {where}", measured, chance


def _difference(key: str, values: Sequence[Any], figures: np.ndarray, metric: str) -> tuple[str, str, Chance]:
    """Tests whether the figure differs between choices."""
    means, chance = compare_groups([full_text(value) for value in values], figures)
    listed = ", ".join(f"{shown(name)} {mean:.4f}" for name, mean in sorted(means.items(), key=lambda item: item[1]))
    return f"{key} made a difference", f"mean {metric}: {listed}", chance


def _inactive_adaption(search: Search) -> list[str]:
    inactive, adaptive = [], 0
    for trial in search.trials:
        if trial.config is None or trial.total_steps is None or not trial.config.loss.is_taid:
            continue
        schedule = trial.config.schedule
        if schedule.mode not in ("adaptive", "normalised"):
            continue
        adaptive += 1
        gain = schedule.gain if schedule.mode == "normalised" else 0.0
        if adaptive_is_linear(schedule.t_start, schedule.t_end, schedule.alpha, trial.total_steps, gain):
            inactive.append(trial.name)
    if not inactive:
        return []
    return [
        f"Adaptive part inactive in {len(inactive)} of {adaptive} adaptive trials ({_names(inactive)}): "
        "alpha * N * (1 - t_start) / 2 <= t_end - t_start, where N is the number of steps (and 1/2 is sigmoid(gain) in mode "
        "normalised). There t follows its linear floor, and neither schedule.beta nor the loss changes it."
    ]


def _edges(search: Search) -> list[str]:
    """Names the best trial's values that lie at the edge of their range, once there are enough trials to trust it."""
    best = search.best()
    if best is None or len(search.finished()) < MIN_TRIALS:
        return []
    found = []
    for key, distribution in search.space.space.items():
        value, (low, high) = best.params.get(key), bounds(distribution)
        if value is None or low == high or (distribution.kind == "choice" and len(distribution.arguments) < 3):
            continue
        place = position(float(value), low, high, "log" in distribution.kind)
        if not EDGE < place < 1 - EDGE:
            end = "lower" if place < 0.5 else "upper"
            found.append(
                f"The best trial's {key} = {shown(value)} lies at the {end} end of what was searched ({shown(low)} to "
                f"{shown(high)}); if the key allows it, look beyond."
            )
    return found


def _seeds(search: Search) -> list[str]:
    if "train.seed" in search.space.space or len(search.finished()) < 2:
        return []
    return [
        "Every trial ran with one and the same seed, so small differences may be chance: train the best few again with "
        "other values of train.seed before you rely on their order."
    ]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _listed(names: Sequence[str]) -> str:
    return f"{_counted(len(names), 'trial')} ({_names(names)})"
