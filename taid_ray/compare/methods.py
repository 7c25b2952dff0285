"""The methods that can be compared, and the search space whose trials are methods times seeds."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args

from taid_ray.config.objective import LossConfig, LossName
from taid_ray.config.schema import DistillConfig
from taid_ray.config.space import MAX_GRID, VARIANT, Space
from taid_ray.errors import ConfigError

SEED = "train.seed"
BY_LOSS = {"gkd": "gkd_offline"}
"""Names of methods that are not their loss's: GKD itself trains on the student's own texts, and here on the data's."""
METHODS = {"sft": "sft"} | {BY_LOSS.get(loss, loss): loss for loss in get_args(LossName)} | {"taid_linear": "taid"}
"""The loss of each method, by the method's name."""


def comparison_space(config: DistillConfig, methods: Sequence[str], seeds: int) -> Space:
    """Makes the space of a comparison: a grid of methods and seeds.

    Method and seed k give a run of `config` that differs in its loss (with its course of t) and in train.seed, which is the
    configuration's plus k. Raises ConfigError for unknown and repeated methods, and for no seeds.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1 (found {seeds})")
    if len(methods) * seeds > MAX_GRID:
        raise ConfigError(
            f"{len(methods)} methods with {seeds} seeds are more than {MAX_GRID} runs; ask for fewer of them"
        )
    for number, method in enumerate(methods):
        if method not in METHODS:
            raise ConfigError(f"--methods: there is no method {method!r}. {_nearest(method)}")
        if method in methods[:number]:
            raise ConfigError(f"--methods names {method} twice; remove one")
    first = config.train.seed
    return Space.model_validate(
        {
            "search": "grid",
            "metric": "cross_entropy",
            "space": {
                VARIANT: {"choice": [*methods]},
                SEED: {"choice": [*range(first, first + seeds)]},
            },  # all of a seed first
            "variants": {method: method_values(config, method) for method in methods},
        }
    )


def method_values(config: DistillConfig, method: str) -> dict[str, Any]:
    """Dotted keys and values that make `config` a run of the method.

    The configuration's own loss keeps its settings. Every other one has its defaults, and what the configuration says of all:
    the share of plain cross-entropy, and memory.
    """
    loss = METHODS[method]
    return {"loss": _loss_section(config.loss, loss)} | (
        _schedule_values(config, method) if loss.startswith("taid") else {}
    )


def _loss_section(own: LossConfig, loss: str) -> dict[str, Any]:
    if own.name == loss:
        return own.model_dump(mode="json")
    mixed = {} if loss == "sft" else {"sft_weight": own.sft_weight}
    return {"name": loss, "memory_mib": own.memory_mib} | mixed


def _schedule_values(config: DistillConfig, method: str) -> dict[str, Any]:
    """The course of t: linear, or the adaptive one of the configuration, by default the paper's."""
    if method == "taid_linear":
        return {"schedule": config.schedule.model_dump(mode="json", exclude={"gain"}) | {"mode": "linear"}}
    if config.schedule.mode in ("adaptive", "normalised"):
        return {}
    return {"schedule.mode": "adaptive"}


def check_comparable(config: DistillConfig) -> None:
    """Raises ConfigError if the students could not be evaluated: without the teacher itself, or a package."""
    if config.teacher is None:
        raise ConfigError(
            "teacher is null, and a comparison evaluates every student beside a teacher; give teacher.model"
        )
    if config.teacher.is_stored:
        raise ConfigError(
            f"teacher.mode: {config.teacher.mode} has stored outputs only, and a comparison evaluates every student beside the "
            "teacher itself; set teacher.mode: pool"
        )
    if config.data.has_images:
        raise ConfigError(
            "data.images_column: a comparison evaluates its students on text only; remove the key, or compare runs by "
            "`taid-ray search`"
        )
    formats = {source.format for source in config.data.validations} - {"text"}
    if formats:
        from taid_ray.student.rouge import check_rouge_score  # loads torch

        check_rouge_score(f"a comparison on data.format: {formats.pop()}")


def _nearest(method: str) -> str:
    close = [BY_LOSS[method]] if method in BY_LOSS else get_close_matches(method, METHODS, n=1)
    return f"Did you mean {close[0]}?" if close else f"Methods: {', '.join(METHODS)}."
