"""The losses by their names in the configuration."""

from collections.abc import Callable

from torch import Tensor

from taid_ray.losses.divergences import Divergence, forward_kl, log_probs, reverse_kl, tvd
from taid_ray.losses.mixtures import check_weight, js, skew_forward_kl, skew_reverse_kl
from taid_ray.losses.taid import log_taid_target, taid

_PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "tvd": tvd}
_WEIGHTED: dict[str, Callable[..., Tensor]] = {
    "js": js,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}
_NAMES = ("taid", *_PLAIN, *_WEIGHTED)


def divergence(name: str, weight: float | None = None) -> Divergence:
    """Returns the loss called `name`; all but taid ignore t. `weight` replaces the mixing weight of js and the skew losses.

    Raises ValueError for an unknown name, a weight outside [0, 1], or a weight for a loss that has none.
    """
    _check_name(name)
    if weight is not None:
        check_weight(weight)
    if name in _WEIGHTED:
        weighted, weights = _WEIGHTED[name], () if weight is None else (weight,)
        return lambda student_logits, teacher_logits, t: weighted(student_logits, teacher_logits, *weights)
    if weight is not None:
        raise ValueError(f"only {', '.join(_WEIGHTED)} have a mixing weight, {name} has none (found {weight})")
    if name == "taid":
        return taid
    plain = _PLAIN[name]
    return lambda student_logits, teacher_logits, t: plain(student_logits, teacher_logits)


def log_target(name: str) -> Divergence | None:
    """Returns the log-probabilities [N, V] of the target of the loss `name`, if the loss lacks that target's entropy.

    With that entropy added, taid, forward_kl and skew_forward_kl become the cross-entropy form of the published code.
    None for the other losses, which are the same there. Raises ValueError for an unknown name.
    """
    _check_name(name)
    if name == "taid":
        return log_taid_target
    if name in ("forward_kl", "skew_forward_kl"):
        return lambda student_logits, teacher_logits, t: log_probs(teacher_logits.detach())
    return None


def _check_name(name: str) -> None:
    if name not in _NAMES:
        raise ValueError(f"there is no loss {name!r}; use {', '.join(_NAMES)}")
