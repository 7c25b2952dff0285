"""The losses by their names in the configuration."""

from collections.abc import Callable

import torch
from torch import Tensor

from taid_ray.errors import ConfigError
from taid_ray.losses.divergences import (
    Divergence,
    entropy_from_log_probs,
    forward_kl,
    js,
    log_probs,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from taid_ray.losses.taid import log_taid_target, taid

_PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "tvd": tvd}
_WEIGHTED: dict[str, Callable[..., Tensor]] = {
    "js": js,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}
_NAMES = ("taid", *_PLAIN, *_WEIGHTED)


def divergence(name: str, weight: float | None = None) -> Divergence:
    """The loss called `name`; all but taid ignore t. `weight` replaces the mixing weight of js and the skew losses.

    Raises ConfigError for an unknown name, a weight outside [0, 1] or a weight for a loss that has none.
    """
    _check_name(name)
    if weight is not None and name not in _WEIGHTED:
        raise ConfigError(f"loss.weight = {weight} goes with {', '.join(_WEIGHTED)} only, not with {name}; remove it")
    if weight is not None and not 0 <= weight <= 1:
        raise ConfigError(f"loss.weight must lie within [0, 1], found {weight}")
    if name == "taid":
        return taid
    loss: Callable[..., Tensor] = _PLAIN.get(name) or _WEIGHTED[name]
    options = () if weight is None else (weight,)
    return lambda student_logits, teacher_logits, t: loss(student_logits, teacher_logits, *options)


def log_target(name: str) -> Divergence | None:
    """The log-probabilities [N, V] of what the loss `name` pulls the student to, if their entropy is missing there.

    With that entropy added, taid, forward_kl and skew_forward_kl become the cross-entropy form of the published code.
    None for the other losses, which are the same there. Raises ConfigError for an unknown name.
    """
    _check_name(name)
    if name == "taid":
        return log_taid_target
    if name in ("forward_kl", "skew_forward_kl"):
        return lambda student_logits, teacher_logits, t: log_probs(teacher_logits.detach())
    return None


def target_entropy(name: str) -> Divergence:
    """What the loss `name` lacks to be the cross-entropy form of the published code, [N], without gradient.

    That is the entropy of `log_target`, and 0 for the losses without one. Raises ConfigError for an unknown name.
    """
    target = log_target(name)
    if target is None:
        return lambda student_logits, teacher_logits, t: torch.zeros(len(teacher_logits), device=teacher_logits.device)
    return lambda student_logits, teacher_logits, t: entropy_from_log_probs(target(student_logits, teacher_logits, t))


def _check_name(name: str) -> None:
    if name not in _NAMES:
        raise ConfigError(f"loss.name = {name!r} is unknown; use one of {', '.join(_NAMES)}")
