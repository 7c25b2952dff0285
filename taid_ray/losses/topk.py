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


@dataclass(frozen=True)
class Buckets:
    """Both sides on the buckets at some temperature, see `bucketed_`."""

    student: Tensor
    """Logits [N, k + 1]."""
    teacher: Tensor
    """Logits [N, k + 1]."""
    ids: Tensor
    """[N, k]"""
    shares: Tensor
    """[N, V]: each id's share of the tail at that temperature."""
    tail_entropy: Tensor
    """[N]: entropy of these shares."""
    normaliser: Tensor
    """[N]: logsumexp of the student's logits at temperature 1."""


def bucketed_(logits: Tensor, known: TopK, temperature: float | Tensor) -> Buckets:
    """Puts the student's logits [N, V] and the teacher into the buckets, and overwrites `logits`.

    At temperature T the student's tail is logsumexp of its logits divided by T, and the teacher's follows from its mass and
    the shape it has from the student, s_v = q_v / Q: the sum of (p_tail s_v)^(1/T). On the tail p / q is one number again.
    """
    ids, teacher = known.ids.long(), known.buckets(logits.dtype)
    student = take_buckets_(logits, ids)
    normaliser, own_tail = student.logsumexp(-1), student[:, -1:] / temperature
    if isinstance(temperature, Tensor) or temperature != 1:
        teacher = teacher / temperature
        tail = logits.div_(temperature).logsumexp(-1, keepdim=True)
        student = torch.cat([student[:, :-1] / temperature, tail], -1)
        teacher[:, -1:] += _finite(tail - own_tail)
    return Buckets(student, teacher, ids, *tail_shares_(logits, student), normaliser)


def with_labels(known: TopK, labels: Tensor) -> tuple[TopK, Tensor]:
    """Returns a TopK whose ids contain the labels [N], and the label's place [N] among them.

    Where a label was in the tail, it takes the place of the least likely id, which goes there.
    """
    label_logs = known.label_log_probs
    log_probs = known.log_probs.to(torch.promote_types(known.log_probs.dtype, label_logs.dtype))
    among = known.ids == labels.unsqueeze(-1)
    found = among.any(-1)
    place = torch.where(found, among.int().argmax(-1), log_probs.argmin(-1))
    at = place.unsqueeze(-1)
    old = log_probs.gather(-1, at).squeeze(-1)
    tail = (known.log_tail.exp() + old.exp() - label_logs.exp()).clamp(min=0.0).log()
    return TopK(
        log_probs.scatter(-1, at, torch.where(found, old, label_logs).unsqueeze(-1)),
        known.ids.scatter(-1, at, labels.to(known.ids.dtype).unsqueeze(-1)),
        torch.where(found, known.log_tail, tail),
        label_logs,
    ), place


def _finite(x: Tensor) -> Tensor:
    """Puts 0 in the place of what is no finite number: the logits of empty buckets, and their differences."""
    return x.nan_to_num(0.0, 0.0, 0.0)


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
