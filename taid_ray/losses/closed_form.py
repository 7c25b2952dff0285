"""KL(p || q) for a target p that is held fixed: its gradient with respect to the student's logits is q - p.

No autograd graph: two softmaxes, and beside them one tensor of the size of the logits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from taid_ray.losses.taid import EXCLUDED


class ClosedForm(NamedTuple):
    """Result of `closed_form_kl_`."""

    kl: Tensor
    """KL(p || q) [N]"""
    entropy: Tensor
    """Entropy of p [N]"""
    normaliser: Tensor
    """logsumexp of the student's logits [N]"""
    target: Tensor
    """p [N, V]"""


def closed_form_kl_(logits: Tensor, target_logits: Tensor) -> ClosedForm:
    """Computes KL(p || q) for q, p = softmax of logits, target_logits, and overwrites `logits` with its gradient q - p.

    Both are [N, V] and at least float32; target_logits stay as they are.

    Masked vocabulary as in divergences; a row without any target (all of it below EXCLUDED) has KL +inf.

    The KL is summed as p log(p / q) - p + q, every term of which is at least 0 and flat at p = q: rounding in the two
    normalisers, which would dominate a small KL, cancels to first order.
    """
    q, p = torch.softmax(logits, -1), torch.softmax(target_logits, -1)
    # log q = logits - top_logit + log(top_q), and so for p: no second pass of exp or log over the vocabulary.
    top_logit, top_target = logits.amax(-1, keepdim=True), target_logits.amax(-1, keepdim=True)
    log_top_q, log_top_p = q.amax(-1).log(), p.amax(-1).log()
    target_logits = target_logits - top_target
    gap = torch.sub(target_logits, logits.sub_(top_logit), out=logits)
    # nansum, because 0 * inf counts as 0. A NaN in the logits is not lost: it is in log_top_q or log_top_p.
    kl = gap.mul_(p).nansum(-1).add_(log_top_p).sub_(log_top_q)
    entropy = target_logits.mul_(p).nansum(-1).add_(log_top_p).neg_()
    kl.add_(torch.sub(q, p, out=logits).sum(-1)).masked_fill_(top_target.squeeze(-1) < EXCLUDED, math.inf)
    return ClosedForm(kl, entropy, top_logit.squeeze(-1) - log_top_q, p)
