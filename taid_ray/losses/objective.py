"""The quantity to minimise, on a block of loss positions: values, and the gradient with respect to the student's logits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taid_ray.losses.closed_form import CLOSED_FORM, closed_form_
from taid_ray.losses.divergences import check_temperature, entropy_from_log_probs
from taid_ray.losses.registry import METHODS, divergence, log_target
from taid_ray.losses.topk import TopK, bucketed_, spread_, with_labels

SPARING = frozenset(CLOSED_FORM) - {"adaptive_kl", "js", "gkd"}
"""Losses that keep few tensors of a block alive. Adaptive KL sorts one; the others need a third distribution."""


class BlockResult(NamedTuple):
    """Values and gradient of an objective on N positions."""

    values: Tensor
    """[3, N]: divergence, entropy of its target, cross-entropy on the labels."""
    gradient: Tensor | None
    """[N, V]: gradient of the objective's sum with respect to the student's logits."""
    temperature_slope: Tensor | None
    """[N]: derivative of the divergence with respect to a temperature that learns."""


class _Tempered(NamedTuple):
    """A divergence and the entropy of its target, [N] each, of logits that are divided by the temperature."""

    kl: Tensor
    entropy: Tensor
    normaliser: Tensor
    """[N]: logsumexp of the student's logits before that division."""
    gradient: Tensor | None
    """[N, V], with respect to the divided logits."""
    slope: Tensor | None
    """[N], with respect to the temperature."""


SFT = "sft"
"""Objective without a teacher: the cross-entropy on the labels, which is KL(one-hot of the label || student)."""


@dataclass(frozen=True)
class Objective:
    """(1 - sft_weight) * divergence + sft_weight * cross-entropy on the labels, per token.

    The divergence is that of logits divided by `temperature`, times its square if `squared`; the cross-entropy has temperature 1.
    """

    name: str
    """The divergence, as registry.METHODS knows it, or SFT."""
    t: Tensor
    """TAID's interpolation, within [0, 1]: a 0-dim tensor, whose value is checked on the CPU only. Other losses ignore it."""
    sft_weight: float = 0.0
    """Share of the cross-entropy, within [0, 1]; above 0 it needs labels."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the divergence in place of its own, see registry.Method."""
    temperature: float | Tensor = 1.0
    """Above 0. A 0-dim tensor, whose value the host never looks at, learns if it requires a gradient."""
    squared: bool = False

    def check(self, labels: Tensor | None) -> None:
        """Raises ValueError for an unknown loss, a setting that it cannot have, a temperature that is not above 0 or may not
        learn, t or a share of cross-entropy outside [0, 1], or missing labels."""
        if self.name == SFT and labels is None:
            raise ValueError("sft is the cross-entropy on the labels, and there are none")
        if self.name != SFT:
            divergence(self.name, self.settings)
        check_temperature(self.temperature)
        # For a value on another device the host would have to wait.
        t: Any = self.t.tolist() if self.t.device.type == "cpu" else 0.0
        if not 0 <= t <= 1:
            raise ValueError(f"t must lie within [0, 1], found {t}")
        if not 0 <= self.sft_weight <= 1 or (self.sft_weight > 0 and labels is None):
            raise ValueError(f"sft_weight must lie within [0, 1] and needs labels above 0; found {self.sft_weight}")
        if self.name != SFT and METHODS[self.name].takes_labels and labels is None:
            raise ValueError(f"the loss {self.name} needs labels")
        if self.learns_temperature and self.name != "ctkd":
            raise ValueError(f"only the temperature of ctkd learns, found {self.name}")

    @torch.no_grad()
    def evaluate_(
        self, logits: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, learn: bool
    ) -> BlockResult:
        """Evaluates N positions. Without labels their cross-entropy is 0; without `learn` there is no gradient.

        logits: the student's [N, V] in at least float32; they are overwritten. teacher: logits [N, V], or a TopK of N
        positions, which are not; None for SFT. `t` and a temperature that is a tensor must have the logits' dtype and device.
        """
        if teacher is None:
            assert labels is not None
            return _on_labels(logits, labels, learn)
        label_logits = None if labels is None else logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        pulled = torch.softmax(logits, -1) if learn and self.sft_weight > 0 else None
        if isinstance(teacher, TopK):
            if self.learns_temperature:
                raise ValueError("a temperature learns from whole distributions only, found the likeliest ids")
            found = self._on_buckets(logits, teacher, labels, learn)
        else:
            found = self._on_vocabulary(logits, teacher, labels, learn)
        factor = self.temperature**2 if self.squared else 1.0
        ce = torch.zeros_like(found.kl) if label_logits is None else found.normaliser - label_logits
        values = torch.stack([found.kl * factor, found.entropy * factor, ce])
        slope = found.slope
        if slope is not None and self.squared:
            slope = factor * slope + 2 * self.temperature * found.kl
        if found.gradient is None:
            return BlockResult(values, None, slope)
        gradient = found.gradient
        if self._tempered or self.sft_weight > 0:
            gradient.mul_((1 - self.sft_weight) * factor / self.temperature)
        if pulled is not None and labels is not None:
            gradient.add_(pulled, alpha=self.sft_weight)
            gradient.scatter_add_(-1, labels.unsqueeze(-1), gradient.new_full((len(labels), 1), -self.sft_weight))
        return BlockResult(values, gradient, slope)

    def many_tensors(self, teacher: object) -> bool:
        """Tests whether many tensors over the vocabulary are alive at once against this teacher (logits, or a TopK)."""
        return self.name not in (*SPARING, SFT) and not isinstance(teacher, TopK)

    def total(self, kl: Tensor, ce: Tensor) -> Tensor:
        """Sums both parts by their shares. A share of 0 drops its term: 0 * inf would be NaN."""
        terms = [share * term for share, term in ((1 - self.sft_weight, kl), (self.sft_weight, ce)) if share > 0]
        return sum(terms, start=torch.zeros_like(kl))

    @property
    def learns_temperature(self) -> bool:
        """True if the temperature gets a gradient."""
        return isinstance(self.temperature, Tensor) and self.temperature.requires_grad

    @property
    def _tempered(self) -> bool:
        return isinstance(self.temperature, Tensor) or self.temperature != 1

    @property
    def _numbers(self) -> dict[str, float]:
        return METHODS[self.name].settings | dict(self.settings)

    def _on_vocabulary(self, logits: Tensor, teacher: Tensor, labels: Tensor | None, learn: bool) -> _Tempered:
        normaliser = None
        if self._tempered:
            normaliser = logits.logsumexp(-1)
            logits, teacher = logits.div_(self.temperature), teacher / self.temperature
        slope = None
        if self.name in CLOSED_FORM:
            kl, own, entropy, slope = closed_form_(self.name, self._numbers, logits, teacher, self.t, labels)
            gradient = logits if learn else None
            slope = slope / self.temperature if slope is not None and learn and self.learns_temperature else None
        else:
            # The entropy comes first: its temporaries are gone before the graph of the divergence grows.
            entropy, own = self._entropy(logits, teacher), logits.logsumexp(-1) if normaliser is None else normaliser
            kl, gradient = self._by_autograd(logits, teacher, labels, learn)
        entropy = torch.zeros_like(kl) if entropy is None or log_target(self.name) is None else entropy
        return _Tempered(kl, entropy, own if normaliser is None else normaliser, gradient, slope)

    def _by_autograd(
        self, logits: Tensor, teacher: Tensor, labels: Tensor | None, learn: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits.requires_grad_(learn)
        with torch.set_grad_enabled(learn):
            kl = divergence(self.name, self.settings)(logits, teacher, self.t, labels)
            return kl.detach(), torch.autograd.grad(kl.sum(), logits)[0] if learn else None

    def _entropy(self, logits: Tensor, teacher: Tensor) -> Tensor | None:
        target = log_target(self.name)
        return entropy_from_log_probs(target(logits, teacher, self.t)) if target else None

    def _on_buckets(self, logits: Tensor, teacher: TopK, labels: Tensor | None, learn: bool) -> _Tempered:
        if METHODS[self.name].takes_labels and labels is not None:
            teacher, labels = with_labels(teacher, labels)
        found = bucketed_(logits, teacher, self.temperature)
        kl, gradient = self._by_autograd(found.student, found.teacher, labels, learn)
        entropy, target = torch.zeros_like(kl), log_target(self.name)
        if target:
            log_p = target(found.student, found.teacher, self.t)
            entropy = entropy_from_log_probs(log_p) + log_p[:, -1].exp() * found.tail_entropy
        if gradient is not None:
            gradient = spread_(gradient, found.shares, found.ids)
        return _Tempered(kl, entropy, found.normaliser, gradient, None)


def _on_labels(logits: Tensor, labels: Tensor, learn: bool) -> BlockResult:
    """Evaluates SFT. The gradient, softmax minus one-hot, takes the place of the logits [N, V]."""
    normaliser, at = logits.logsumexp(-1), labels.unsqueeze(-1)
    ce = normaliser - logits.gather(-1, at).squeeze(-1)
    values = torch.stack([ce, torch.zeros_like(ce), ce])
    if not learn:
        return BlockResult(values, None, None)
    gradient = logits.sub_(normaliser.unsqueeze(-1)).exp_()
    return BlockResult(values, gradient.scatter_add_(-1, at, gradient.new_full((len(labels), 1), -1.0)), None)


def block_rows(chunk_tokens: int, in_graph: bool) -> int:
    """The number of rows of a chunk to evaluate at once, so that what is alive stays below two thirds of its logits.

    In closed form and on buckets that is up to 6 tensors of a block, else up to 14; one more with a
    soft-capped student, and another one for each side in bfloat16. Fewer rows would fit a CPU's cache better, but threads meet
    after every operation, and where they share the cores with other processes each meeting may cost a time slice: with 8 rows
    of 32,000 ids a loss took 15 s that took 0.7 s on idle cores, with 64 rows 2 s.
    """
    return max(1, chunk_tokens // (32 if in_graph else 10))
