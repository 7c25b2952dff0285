"""Permutation tests over ranks: whether a searched key and a figure go together, or chance explains it as well.

They assume nothing about the distribution of figures, and give the same answer for the same figures.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

ALL_ORDERS = 8
"""Number of trials up to which all orders of them are counted, 40,320 at most; of more, SAMPLED_ORDERS are drawn."""
SAMPLED_ORDERS = 10_000

Statistic = Callable[[np.ndarray], np.ndarray]


class Chance(NamedTuple):
    """The result of a test."""

    p: float
    """Share of all orders of the figures that show at least as strong an effect as the real one."""
    least_p: float
    """The same for the strongest effect that these trials could have shown."""


class Trend(NamedTuple):
    """A trend of figures over values, and whether chance explains it as well."""

    rho: float
    """Correlation of the figures' ranks with a line, or with a parabola beside it, over the values' ranks."""
    chance: Chance


def trends(values: Sequence[float], figures: np.ndarray) -> tuple[Trend, Trend]:
    """Slope (Spearman's rho) and bend of figures [n] over values [n], neither of them constant.

    The bend is positive if the figures are lowest in the middle. Two different values have none: 0 with p = 1.
    """
    x, y = (ranks - ranks.mean() for ranks in (_ranks(np.array(values, float)), _ranks(figures)))
    parabola = x**2 - (x**2).mean()
    parabola -= x * (x @ parabola) / (x @ x)
    return _trend_along(x, y), _trend_along(parabola, y)


def _trend_along(shape: np.ndarray, ranks: np.ndarray) -> Trend:
    length = math.sqrt(float((shape @ shape) * (ranks @ ranks)))
    if length < 1e-6:
        return Trend(0.0, Chance(1.0, 1.0))
    return Trend(float(ranks @ shape) / length, _chance(lambda orders: np.abs(orders @ shape) / length, ranks))


def compare_groups(names: Sequence[str], figures: np.ndarray) -> tuple[dict[str, float], Chance]:
    """Mean figure of each group, and how likely chance alone sets their mean ranks as far apart (as Kruskal and Wallis)."""
    groups = {name: np.array([other == name for other in names]) for name in dict.fromkeys(names)}
    ranks = _ranks(figures)
    ranks = ranks - ranks.mean()

    def statistic(orders: np.ndarray) -> np.ndarray:
        return np.asarray(sum(orders[:, members].sum(1) ** 2 / members.sum() for members in groups.values()))

    return {name: float(figures[members].mean()) for name, members in groups.items()}, _chance(statistic, ranks)


def _chance(statistic: Statistic, ranks: np.ndarray) -> Chance:
    """Compares the effect in the real order with that in others. statistic: of orders [m, n] the strength of the effect [m]."""
    if len(ranks) <= ALL_ORDERS:
        orders = np.array(list(itertools.permutations(ranks)))
    else:  # and the real one, so that no p is 0
        orders = np.random.default_rng(0).permuted(np.tile(ranks, (SAMPLED_ORDERS, 1)), axis=1)
        orders[0] = ranks
    strengths, real = statistic(orders), float(statistic(ranks[None])[0])
    tolerance = 1e-9 * max(1.0, real)
    return Chance(
        float((strengths >= real - tolerance).mean()), float((strengths >= strengths.max() - tolerance).mean())
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of values, from 1 for the smallest; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])
