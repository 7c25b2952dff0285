"""Whether one method is better than another: bootstrap of their difference over held-out documents and seeds."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
LEVEL = 0.95
NORMAL_QUANTILE = 1.960
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """A difference of two methods, and the interval that holds it with a confidence of LEVEL."""

    difference: float
    """Mean of the first method's figure minus that of the second one."""
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """True if the interval holds 0, so that other documents and seeds might as well have shown the opposite."""
        return not (self.low > 0 or self.high < 0)

    def exchanged(self) -> "Verdict":
        """The verdict on the same two methods, the second one first."""
        return Verdict(-self.difference, -self.high, -self.low)


UNKNOWN = Verdict(math.nan, -math.inf, math.inf)
"""The verdict where nothing can be compared."""


def judge(first: Floats, second: Floats, weights: Floats) -> Verdict:
    """Compares a figure of two methods.

    first, second: [seeds, documents], means per document; seed k of both methods had the same data, order and first weights.
    weights: [documents], the loss positions of each, or ones. A figure of a method is the weighted mean over documents, and
    the mean over seeds.

    Documents and seeds are drawn anew, each with replacement, DRAWS times; the interval is that between percentiles. A few
    seeds drawn from themselves vary too little: what is particular to a seed is widened, by sqrt(S / (S - 1)) for the missing
    degree of freedom and by the ratio of Student's t to the normal quantile. Of one seed nothing is known about other seeds,
    and the interval is over documents only. Always the same for the same figures. Figures that are not finite
    are UNKNOWN.
    """
    gaps = first - second
    if not np.isfinite(gaps).all():
        return UNKNOWN
    seeds, documents = gaps.shape
    mean = gaps.mean(0)
    widened = mean + _widening(seeds) * (gaps - mean)
    numbers = np.random.default_rng(0)
    drawn_seeds = numbers.multinomial(seeds, [1 / seeds] * seeds, size=DRAWS) / seeds
    drawn = numbers.multinomial(documents, [1 / documents] * documents, size=DRAWS) * weights
    differences = ((drawn_seeds @ widened) * drawn).sum(1) / drawn.sum(1)
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Verdict(float(mean @ weights / weights.sum()), float(low), float(high))


def _widening(seeds: int) -> float:
    """The factor for what is particular to a seed; 1 for one seed, of which nothing is."""
    if seeds == 1:
        return 1.0
    quantile = T_QUANTILES[seeds - 2] if seeds - 2 < len(T_QUANTILES) else NORMAL_QUANTILE
    return math.sqrt(seeds / (seeds - 1)) * quantile / NORMAL_QUANTILE
