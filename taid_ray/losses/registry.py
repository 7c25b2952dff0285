"""The losses by their names in the configuration, all at temperature 1: whoever has another one divides the logits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from taid_ray.losses.adaptive_kl import adaptive_kl
from taid_ray.losses.decoupled import dkd
from taid_ray.losses.divergences import forward_kl, log_probs, reverse_kl, tvd
from taid_ray.losses.mixtures import gkd, js, skew_forward_kl, skew_reverse_kl
from taid_ray.losses.published import published_adaptive_kl
from taid_ray.losses.taid import log_taid_target, taid, taid_reverse_kl

Divergence = Callable[..., Tensor]
"""A loss as a function (student_logits [N, V], teacher_logits [N, V], t, labels [N] or None) -> [N]; `log_target` gives
-> [N, V]."""


@dataclass(frozen=True)
class Method:
    """A loss, and what it is a function of beside the logits of both sides."""

    function: Callable[..., Tensor]
    settings: dict[str, float] = field(default_factory=dict)
    """Its numbers, by their names in the section `loss` of the configuration, with their defaults."""
    takes_t: bool = False
    takes_labels: bool = False


METHODS = {
    "taid": Method(taid, takes_t=True),
    "taid_reverse_kl": Method(taid_reverse_kl, takes_t=True),
    "forward_kl": Method(forward_kl),
    "reverse_kl": Method(reverse_kl),
    "tvd": Method(tvd),
    "js": Method(js, {"weight": 0.1}),
    "skew_forward_kl": Method(skew_forward_kl, {"weight": 0.1}),
    "skew_reverse_kl": Method(skew_reverse_kl, {"weight": 0.1}),
    "adaptive_kl": Method(adaptive_kl, {"mu": 0.5}),
    "dkd": Method(partial(dkd, temperature=1.0), {"alpha": 1.0, "beta": 8.0}, takes_labels=True),
    "ctkd": Method(forward_kl),
    "gkd": Method(gkd, {"beta": 0.5}),
    "published_ctkd": Method(forward_kl),
    "published_adaptive_kl": Method(published_adaptive_kl, {"mu": 0.5}),
}


def divergence(name: str, settings: Mapping[str, float] | None = None) -> Divergence:
    """Returns the loss called `name`. settings: numbers in place of its own, see `Method.settings`.

    Raises ValueError for an unknown name, and for a setting that the loss does not have.
    """
    method = _method(name)
    if other := set(settings or {}) - set(method.settings):
        own = f"has {' and '.join(method.settings)}" if method.settings else "has none"
        raise ValueError(f"the loss {name} {own}, found the settings {', '.join(sorted(other))}")
    numbers = {
        _PARAMETERS.get((name, key), key): value for key, value in (method.settings | dict(settings or {})).items()
    }

    def evaluate(student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor, labels: Any = None) -> Tensor:
        others = [*([labels] if method.takes_labels else []), *([t] if method.takes_t else [])]
        return method.function(student_logits, teacher_logits, *others, **numbers)

    return evaluate


_PARAMETERS = {("js", "weight"): "teacher_weight"}
"""Settings that the function knows by another name."""


def log_target(name: str) -> Divergence | None:
    """Returns the log-probabilities [N, V] of the target of the loss `name`, if the loss lacks that target's entropy.

    With that entropy added, taid, forward_kl, published_ctkd and skew_forward_kl become the published cross-entropy form.
    None for the other losses, which are the same there. Raises ValueError for an unknown name.
    """
    _method(name)
    if name == "taid":
        return lambda student_logits, teacher_logits, t, labels=None: log_taid_target(student_logits, teacher_logits, t)
    if name in ("forward_kl", "published_ctkd", "skew_forward_kl"):
        return lambda student_logits, teacher_logits, t, labels=None: log_probs(teacher_logits.detach())
    return None


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"there is no loss {name!r}; use {', '.join(METHODS)}")
    return METHODS[name]
