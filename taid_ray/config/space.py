"""Search spaces: the YAML file behind `taid-ray tune --space`, typed, and checked before anything starts.

The keys under `space` are those of the run configuration, plus `schedule.alpha_steps`: alpha times the number of
optimizer steps, which is what moves t and stays comparable between runs of different lengths.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from taid_ray.config.distribution import Distribution
from taid_ray.config.fields import SETS_ROWS, SETS_STEPS, Count, Int, Positive, PositiveInt, Section, SharedByTrials
from taid_ray.config.schema import DistillConfig, build_config, known_keys, marks_of
from taid_ray.config.text import explain, read_tree
from taid_ray.errors import ConfigError

ALPHA_STEPS = "schedule.alpha_steps"
VARIANT = "variant"
"""Key of a space that chooses among `Space.variants`."""
MAX_GRID = 500
"""Largest number of trials of a grid: the files of a search are written anew for each of them."""
DRAWS = 64
"""Number of joint draws that `Space.check` puts through the configuration, besides every end of every range."""


class Space(Section):
    """Settings of a search, as its YAML file has them."""

    search: Literal["random", "grid", "optuna"] = "random"
    """Way to choose the next trial. `random`: values are drawn. `grid`: every combination is tried once. `optuna`: values are
    drawn where earlier trials were good (TPE)."""
    scheduler: Literal["fifo", "asha", "median"] = "fifo"
    """Trials that are stopped early. `fifo`: none. `asha`: at every rung, all but the best 1/reduction. `median`: those that
    are worse than the median of the others."""
    metric: Literal["kl", "cross_entropy"] = "kl"
    """The validation figure to minimise."""
    trials: PositiveInt | None = None
    """Number of trials; 16 by default. Not to be given with `search: grid`, which runs each combination once."""
    seed: Annotated[Count, Field(lt=2**32)] = 0
    """Seed of the values that are drawn. The trials' own seed is `train.seed`."""
    grace_fraction: Annotated[Positive, Field(lt=1)] = 0.25
    """With `asha` and `median`: share of a run's steps before which no trial is stopped."""
    reduction: Annotated[Int, Field(ge=2)] = 2
    """With `asha`: one of this many trials goes on at every rung."""
    space: Annotated[dict[str, Distribution], Field(min_length=1)]
    """Dotted configuration keys, each with the distribution of its values."""
    variants: dict[str, Annotated[dict[str, Any], Field(min_length=1)]] = {}
    """Groups of values that go together: a name, and the dotted keys with their values. The key `variant` under `space` chooses
    among the names, as in `variant: {choice: [linear, adaptive]}`."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Space":
        for key, distribution in self.space.items():
            if self.search == "grid" and distribution.kind != "choice":
                raise ValueError(
                    f"space.{key}: search: grid takes choice only (found {distribution.kind}); list the values"
                )
            if self.search == "optuna" and distribution.kind == "qloguniform":
                raise ValueError(f"space.{key}: search: optuna has no qloguniform; use loguniform or lograndint")
        if self.search == "grid" and self.trials is not None:
            raise ValueError(
                f"trials = {self.trials}, but search: grid runs each of its {self.num_trials} combinations once; remove it"
            )
        if self.search == "grid" and self.num_trials > MAX_GRID:
            raise ValueError(
                f"search: grid has {self.num_trials:,} combinations, more than {MAX_GRID:,}; use search: random"
            )
        self._variants_fit()
        return self

    def _variants_fit(self) -> None:
        """Raises ValueError unless the key `variant` chooses among variants that there are, of keys not searched besides."""
        chosen = self.space.get(VARIANT)
        names = chosen.arguments if chosen else []
        if set(map(str, names)) != self.variants.keys():
            raise ValueError(
                f"variants: space.{VARIANT} must be a choice of exactly the names there (found {names} for "
                f"{[*self.variants]})"
            )
        for name, values in self.variants.items():
            if both := [key for key in values if key in self.space]:
                raise ValueError(f"variants.{name}: {both[0]} is also under space; leave it out in one of them")

    @property
    def keys(self) -> list[str]:
        """Dotted configuration keys that trials may differ in: searched ones, and those of the variants."""
        varied = [key for values in self.variants.values() for key in values]
        return list(dict.fromkeys([*(key for key in self.space if key != VARIANT), *varied]))

    @property
    def num_trials(self) -> int:
        """Number of trials of the whole search."""
        if self.search == "grid":
            return math.prod(len(distribution.arguments) for distribution in self.space.values())
        return self.trials or 16

    def check(self, tree: Mapping[str, Any], total_steps: int) -> None:
        """Checks that every trial will have a valid configuration, so that a mistake does not show up in the tenth trial.

        tree: the base configuration as a nested mapping; total_steps: its optimizer steps. Raises ConfigError.
        """
        base = build_config(tree)
        self._check_keys()
        self._check_lengths(base)
        for params in self._candidates():
            try:
                self._check_trial(trial_config(tree, params, total_steps, self.variants), total_steps)
            except ConfigError as error:
                values = ", ".join(f"{key} = {value!r}" for key, value in params.items())
                raise ConfigError(f"{error}\nThis comes from the search space, which allows {values}.") from None

    def _candidates(self) -> Iterator[dict[str, Any]]:
        """Yields parameters that stand for those of all trials.

        First every end and choice of every key, with the first ends of the others; then the whole grid or random draws, which
        find what only a combination does wrong.
        """
        first = {key: distribution.ends[0] for key, distribution in self.space.items()}
        for key, distribution in self.space.items():
            yield from (first | {key: end} for end in distribution.ends)
        if self.search == "grid":
            choices = (distribution.arguments for distribution in self.space.values())
            yield from (dict(zip(self.space, values, strict=True)) for values in itertools.product(*choices))
        else:
            numbers = random.Random(0)
            yield from ({key: s.draw(numbers) for key, s in self.space.items()} for _ in range(DRAWS))

    def _check_keys(self) -> None:
        # A range such as student.workers is a section too, but one that a number stands for.
        known = [key for key in known_keys() if not key.endswith((".min", ".max"))]
        sections = {key[:dot] for key in known for dot in range(len(key)) if key[dot] == "."}
        for key in self.keys:
            for mark in marks_of(key):
                if isinstance(mark, SharedByTrials):
                    raise ConfigError(
                        f"space.{key}: cannot be searched, because {mark.meaning}; set it in the configuration"
                    )
            if key in sections and key in self.space:
                raise ConfigError(f"space.{key}: is a whole section; name one of its keys, for example {_below(key)}")

    def _check_lengths(self, base: DistillConfig) -> None:
        """Refuses keys that change the number of steps where trials are compared by steps, or alpha is divided by them."""
        rows_change = base.train.epochs is not None  # so that steps do
        changing = {SETS_STEPS, SETS_ROWS} if rows_change else {SETS_STEPS}
        lengths = [key for key in self.keys if changing.intersection(marks_of(key))]
        if lengths and self.scheduler != "fifo":
            # ASHA would end a longer trial at the base's last step, and call it worse than others.
            raise ConfigError(
                f"space.{lengths[0]}: can change the number of steps, and scheduler: {self.scheduler} compares trials of "
                "one length; set scheduler: fifo, or leave the key out"
                + (
                    ""
                    if SETS_STEPS in marks_of(lengths[0])
                    else ", or set train.steps instead of train.epochs in the configuration"
                )
            )
        if ALPHA_STEPS not in self.keys:
            return
        if "schedule.alpha" in self.keys:
            raise ConfigError(f"space: schedule.alpha and {ALPHA_STEPS} set the same value; remove one")
        if lengths and base.train.steps is None and "train.steps" not in self.space:
            raise ConfigError(
                f"space.{lengths[0]}: changes the number of steps of train.epochs, by which {ALPHA_STEPS} is divided; "
                "set train.steps in the configuration, or search schedule.alpha"
            )

    def _check_trial(self, config: DistillConfig, total_steps: int) -> None:
        if self.metric == "kl" and config.teacher is None:
            raise ConfigError(
                "metric: kl compares the student with its teacher, and teacher is null; set metric: cross_entropy"
            )
        steps, every = config.train.steps or total_steps, config.train.eval_every
        if self.scheduler != "fifo" and not 0 < every < steps:
            raise ConfigError(
                f"train.eval_every: {every} gives no validation before the last of {steps} steps, and scheduler: "
                f"{self.scheduler} compares validations; set it, for example to {max(1, steps // 10)}"
            )


def load_space(path: str | Path, values: Mapping[str, Any] | None = None) -> Space:
    """Reads a search file. values: top-level keys to set beside it, such as trials. Raises ConfigError, naming the file."""
    try:
        return Space.model_validate(read_tree(path) | dict(values or {}))
    except ValidationError as error:
        lines = (f"{path}: {explain(problem, _neighbours(problem))}" for problem in error.errors())
        raise ConfigError("\n".join(lines)) from None


def trial_config(
    tree: Mapping[str, Any],
    params: Mapping[str, Any],
    total_steps: int | None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> DistillConfig:
    """Makes the configuration of one trial: the base tree with params (dotted keys) set, and the values of its variant.

    schedule.alpha_steps becomes schedule.alpha by the trial's own train.steps or, where it has epochs, by total_steps.
    Raises ConfigError.
    """
    values = dict(params)
    if (name := values.pop(VARIANT, None)) is not None:
        values = {**(variants or {})[name], **values}
    product = values.pop(ALPHA_STEPS, None)
    config = build_config(tree, values=values)
    if product is None:
        return config
    steps = config.train.steps or total_steps
    if steps is None:
        raise ConfigError(f"{ALPHA_STEPS} needs the number of steps, which train.epochs does not say; set train.steps")
    if isinstance(product, bool) or not isinstance(product, int | float) or not 0 <= product <= steps:
        raise ConfigError(
            f"{ALPHA_STEPS} must lie within [0, {steps}]: divided by the {steps} steps it is schedule.alpha, which lies "
            f"within [0, 1] (found {product!r})"
        )
    return build_config(tree, values=values | {"schedule.alpha": product / steps})


def _below(section: str) -> str:
    return next(key for key in known_keys() if key.startswith(f"{section}."))


def _neighbours(problem: Any) -> list[str]:
    """Lists the keys that an unknown one may have been meant to be: a dotted one belongs under `space`."""
    dotted = "." in ".".join(map(str, problem["loc"][:1]))
    return [f"space.{key}" for key in known_keys()] if dotted else list(Space.model_fields)
