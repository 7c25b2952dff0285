"""Losses against a teacher that sent only its k likeliest ids: k buckets of one id and one of all the others.

    student's buckets   q_1 .. q_k, Q = sum of the others' q            teacher's buckets   p_1 .. p_k, p_tail

Every loss of the registry is an f-divergence, sum_v q f(p / q). Computed on the buckets it equals, in value and gradient,
the same loss on the whole vocabulary against the teacher whose tail has the student's shape, p_tail * q_v / Q with the
shape held fixed: p / q, and for taid p_t / q, is one number on the whole tail. The cross-entropy form needs one term
more, the entropy of the tail's shape (`tail_shares_`) times the target's tail mass.

Softmax does not see a shift, so the logits [z_1 .. z_k, logsumexp of the others] are the student's buckets, and the
functions of this package take them as they take logits of a whole vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest log of a tail's mass: rounding may bring it to 0, where no mass would be left for the k ids.
_MAX_LOG_TAIL = -1e-7


@dataclass(frozen=True)
class TopK:
    """The teacher's distributions at N loss positions, as far as they were sent: the likeliest ids, and the mass of the rest."""

    log_probs: Tensor
    """[N, k], any float dtype: log-probabilities of the likeliest ids, perhaps rounded."""
    ids: Tensor
    """[N, k], integers below V, no id twice in a row."""
    log_tail: Tensor
    """[N] float32: log of the mass of all other ids; -inf for none."""
    label_log_probs: Tensor
    """[N] float32: log-probability of each position's label."""

    def rows(self, rows: slice) -> "TopK":
        """Selects some of the positions, as views."""
        return TopK(self.log_probs[rows], self.ids[rows], self.log_tail[rows], self.label_log_probs[rows])

    def buckets(self, dtype: torch.dtype) -> Tensor:
        """Computes log-probabilities [N, k + 1] in `dtype`.

        The tail stays as sent; the k ids, whose values may be rounded, share what it leaves.
        """
        log_tail = self.log_tail.to(dtype).clamp(max=_MAX_LOG_TAIL).unsqueeze(-1)
        log_rest = torch.log(-torch.expm1(log_tail))
        return torch.cat([torch.log_softmax(self.log_probs.to(dtype), -1) + log_rest, log_tail], -1)


def take_buckets_(logits: Tensor, ids: Tensor) -> Tensor:
    """Takes the bucket logits [N, k + 1] out of logits [N, V], for ids [N, k].

    Overwrites `logits` with -inf at the ids, so that only the tail remains there.
    """
    chosen = logits.gather(-1, ids)
    logits.scatter_(-1, ids, -math.inf)
    return torch.cat([chosen, logits.logsumexp(-1, keepdim=True)], -1)


def tail_shares_(tail: Tensor, buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Computes each id's share of the tail, q_v / Q [N, V], and the entropy [N] of these shares.

    tail: [N, V], as `take_buckets_` left it; overwritten. buckets: [N, k + 1]. Without a tail all shares and the entropy are
    0.
    """
    log_mass = buckets[:, -1:]
    tail.sub_(log_mass.masked_fill(log_mass == -math.inf, 0.0))
    shares = tail.exp()
    return shares, -tail.mul_(shares).nansum(-1)  # 0 * -inf counts as 0


def spread_(grad_buckets: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
    """Turns the gradient with respect to the bucket logits [N, k + 1] into that with respect to the logits [N, V].

    shares: [N, V], from `tail_shares_`; overwritten with the result.
    """
    return shares.mul_(grad_buckets[:, -1:]).scatter_(-1, ids, grad_buckets[:, :-1])
