"""Losses whose gradient has a closed form: values, and the gradient in the place of the student's logits, without a graph.

    loss                                        gradient with respect to the student's logits
    KL(p || q), p held fixed                    q - p
    KL(q || p), p held fixed                    q (log(q / p) - KL(q || p))
    w KL(p || m) + (1-w) KL(q || m)             (1-w) q (log(q / m) - KL(q || m))            m = w p + (1-w) q
    w KL(p || q) + (1-w) KL(q || p), w fixed    the sum of the first two
    alpha TCKD + beta NCKD (DKD)                alpha (q_y - p_y) (1 at y, -q'_v elsewhere) + beta (q'_v - p'_v), 0 at y

With both logits divided by T, a and b, the derivative of KL(p || q) by T is -(<q - p, a> + Cov_p(b, b - a)) / T.

p, q: softmax of target_logits, logits, both [N, V] and at least float32; target_logits stay as they are. Masked vocabulary as in
`divergences`; what an infinite term would pull on the probability in front of its logarithm is left out there as here.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from taid_ray.losses.adaptive_kl import head_weight, weighted
from taid_ray.losses.decoupled import decouple, kl_of_others
from taid_ray.losses.divergences import kl_from_log_probs
from taid_ray.losses.mixtures import log_mixture
from taid_ray.losses.taid import EXCLUDED, mix


class ClosedForm(NamedTuple):
    """Values of a loss; its gradient is where the student's logits were."""

    kl: Tensor
    """The loss [N]"""
    normaliser: Tensor
    """logsumexp of the student's logits [N]"""
    entropy: Tensor | None = None
    """Entropy of p [N], where it is at hand"""
    slope: Tensor | None = None
    """[N]: derivative of the loss by the temperature T, times T, where both logits are divided by it"""


CLOSED_FORM = (
    "taid",
    "taid_reverse_kl",
    "forward_kl",
    "reverse_kl",
    "js",
    "adaptive_kl",
    "dkd",
    "ctkd",
    "published_ctkd",
    "gkd",
)
"""Losses whose gradient is formed without autograd."""


def closed_form_(
    name: str, settings: Mapping[str, float], logits: Tensor, target_logits: Tensor, t: Tensor, labels: Tensor | None
) -> ClosedForm:
    """Computes the loss `name`, one of CLOSED_FORM, and overwrites `logits` with its gradient.

    settings: all of its numbers. t: TAID's, a 0-dim tensor. labels: [N], for dkd.
    """
    if name in ("taid", "taid_reverse_kl"):
        target_logits = mix(logits, target_logits, t)
    weight = settings["beta"] if name == "gkd" else settings.get("weight")
    if name in ("taid", "forward_kl", "ctkd", "published_ctkd") or (name == "gkd" and weight == 0):
        return closed_form_kl_(logits, target_logits, with_slope=name == "ctkd")
    if name in ("taid_reverse_kl", "reverse_kl") or (name == "gkd" and weight == 1):
        return closed_form_reverse_kl_(logits, target_logits)
    if weight is not None:
        return closed_form_js_(logits, target_logits, weight)
    if name == "adaptive_kl":
        return closed_form_adaptive_kl_(logits, target_logits, settings["mu"])
    assert labels is not None
    return closed_form_dkd_(logits, target_logits, labels, settings["alpha"], settings["beta"])


def closed_form_kl_(logits: Tensor, target_logits: Tensor, with_slope: bool = False) -> ClosedForm:
    """Computes KL(p || q), and overwrites `logits` with its gradient. with_slope: also the derivative by the temperature.

    A row without any target (all of it below EXCLUDED) has KL +inf.

    The KL is summed as p log(p / q) - p + q, every term of which is at least 0 and flat at p = q: rounding in the two
    normalisers, which would dominate a small KL, cancels to first order.
    """
    q, p = torch.softmax(logits, -1), torch.softmax(target_logits, -1)
    # log q = logits - top_logit + log(top_q), and so for p: no second pass of exp or log over the vocabulary.
    top_logit, top_target = logits.amax(-1, keepdim=True), target_logits.amax(-1, keepdim=True)
    log_top_q, log_top_p = q.amax(-1).log(), p.amax(-1).log()
    target_logits = target_logits - top_target
    logits.sub_(top_logit)
    # nansum, because 0 * inf counts as 0. A NaN in the logits is not lost: it is in log_top_q or log_top_p.
    own = (q * logits).nansum(-1) if with_slope else None
    gaps = torch.sub(target_logits, logits, out=logits).mul_(p)
    gap, product = gaps.nansum(-1), (gaps * target_logits).nansum(-1) if with_slope else None
    target = target_logits.mul_(p).nansum(-1)
    kl, entropy = gap + log_top_p - log_top_q, -(target + log_top_p)
    kl.add_(torch.sub(q, p, out=logits).sum(-1)).masked_fill_(top_target.squeeze(-1) < EXCLUDED, math.inf)
    slope = None
    if own is not None and product is not None:
        # Of <q - p, a> + Cov_p(b, b - a), with a and b the logits less their largest; infinite only where the KL is.
        slope = -(own - target + gap + product - target * gap).nan_to_num(0.0, 0.0, 0.0)
    return ClosedForm(kl, top_logit.squeeze(-1) - log_top_q, entropy, slope)


def closed_form_reverse_kl_(logits: Tensor, target_logits: Tensor) -> ClosedForm:
    """Computes KL(q || p), and overwrites `logits` with its gradient. A row without any target has KL +inf."""
    log_q, log_p = torch.log_softmax(logits, -1), torch.log_softmax(target_logits, -1)
    normaliser, q = _normaliser(logits, log_q), log_q.exp()
    kl, mean = _expected_(q, log_q.sub_(log_p))
    torch.mul(q, log_q.sub_(mean.unsqueeze(-1)), out=logits)
    return ClosedForm(kl.masked_fill_(target_logits.amax(-1) < EXCLUDED, math.inf), normaliser)


def closed_form_js_(logits: Tensor, target_logits: Tensor, weight: float) -> ClosedForm:
    """Computes w KL(p || m) + (1-w) KL(q || m), m = w p + (1-w) q, and overwrites `logits` with its gradient."""
    log_q, log_p = torch.log_softmax(logits, -1), torch.log_softmax(target_logits, -1)
    normaliser, log_m = _normaliser(logits, log_q), log_mixture(log_p, log_q, weight)
    p = log_p.exp()
    from_teacher, _ = _expected_(p, log_p.sub_(log_m))
    q = torch.exp(log_q, out=p)
    from_student, mean = _expected_(q, log_q.sub_(log_m))
    torch.mul(q, log_q.sub_(mean.unsqueeze(-1)), out=logits).mul_(1 - weight)
    return ClosedForm(weight * from_teacher + (1 - weight) * from_student, normaliser)


def closed_form_adaptive_kl_(logits: Tensor, target_logits: Tensor, mu: float) -> ClosedForm:
    """Computes adaptive KL, see `adaptive_kl`, and overwrites `logits` with its gradient."""
    log_q, log_p = torch.log_softmax(logits, -1), torch.log_softmax(target_logits, -1)
    normaliser, q, p = _normaliser(logits, log_q), log_q.exp(), log_p.exp()
    weight = head_weight(p, q, mu)
    forward = kl_from_log_probs(log_p, log_q)
    reverse, mean = _expected_(q, log_q.sub_(log_p))
    torch.mul(q, log_q.sub_(mean.unsqueeze(-1)), out=logits).mul_(1 - weight.unsqueeze(-1))
    logits.add_(q.sub_(p).mul_(weight.unsqueeze(-1)))
    return ClosedForm(weighted(weight, forward, reverse), normaliser)


def closed_form_dkd_(logits: Tensor, target_logits: Tensor, labels: Tensor, alpha: float, beta: float) -> ClosedForm:
    """Computes alpha TCKD + beta NCKD, see `decoupled`, and overwrites `logits` with its gradient. labels: [N]."""
    labels, normaliser = labels.unsqueeze(-1), logits.logsumexp(-1)
    target_p, others_p = decouple(target_logits, labels)
    target_q, others_q = decouple(logits, labels)
    values = alpha * kl_from_log_probs(target_p, target_q) + beta * kl_of_others(target_p, others_p, target_q, others_q)
    without_p, without_q = (target[:, 1:] == -math.inf for target in (target_p, target_q))
    q, p = others_q.exp_().masked_fill_(without_q, 0.0), others_p.exp_()
    gap = target_q[:, :1].exp() - target_p[:, :1].exp()
    torch.sub(q, p, out=logits).mul_(beta).masked_fill_(without_p | without_q, 0.0)
    logits.sub_(q.mul_(alpha * gap)).scatter_(-1, labels, alpha * gap)
    return ClosedForm(values, normaliser)


def _normaliser(logits: Tensor, log_probs: Tensor) -> Tensor:
    """Computes logsumexp(logits) [N] from the log-softmax."""
    return logits.amax(-1) - log_probs.amax(-1)


def _expected_(q: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Computes sum_v q gap [N], where gap = log(q / p), and the same sum without infinite terms.

    Overwrites the gaps that are infinite, or where q is 0, with 0. Beyond -EXCLUDED they are infinite.
    """
    infinite = gap.masked_fill_(q == 0, 0.0) > -EXCLUDED
    mean = (q * gap.masked_fill_(infinite, 0.0)).sum(-1)
    return mean.masked_fill(infinite.any(-1), math.inf), mean
