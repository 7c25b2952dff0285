"""One Gaussian fitted to a mixture of three: by forward KL, by reverse KL, and by TAID while t goes from 0 to 1.

Integrals are sums over a fine, even grid. For densities that are smooth and vanish at its ends that is exact to rounding
(the trapezoidal rule). All three descend the natural gradient from the same start, in the mean m and the logarithm of the
standard deviation s. With z = (x - m) / s the natural gradient of KL(r || q) is -E_r[x - m] and -E_r[z^2 - 1] / 2; that of
KL(q || p) is the same with q log(q / p) in place of -r.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GRID = np.linspace(-30.0, 30.0, 3001)
"""Points at which densities are evaluated; beyond its ends all of them are below 1e-12."""
SPACING = float(GRID[1] - GRID[0])
RATE = 0.1
"""Step size of the natural gradient."""
FIT_STEPS = 2000
"""Steps of a fit to a fixed target."""
PATH_STEPS = 5000
"""Steps in which t goes from 0 to 1, slowly enough for the Gaussian to follow."""


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution."""

    mean: float
    deviation: float
    """Standard deviation."""

    def log_density(self) -> np.ndarray:
        """Logarithm of the density on the grid, float64 [points]."""
        z = (GRID - self.mean) / self.deviation
        return -(z**2) / 2 - np.log(self.deviation * np.sqrt(2 * np.pi))

    def moved(self, weights: np.ndarray) -> "Gaussian":
        """The Gaussian after one step along weights [points]: E[x - m], and E[z^2 - 1] / 2 for log s, times RATE."""
        offset = GRID - self.mean
        shift = float(weights @ offset)
        growth = float(weights @ ((offset / self.deviation) ** 2 - 1)) / 2
        return Gaussian(self.mean + RATE * shift, self.deviation * float(np.exp(RATE * growth)))


MODES = ((0.3, Gaussian(-6.0, 1.0)), (0.45, Gaussian(0.0, 0.8)), (0.25, Gaussian(5.0, 1.0)))
"""Weights and components of the mixture, which plays the teacher."""
START = Gaussian(0.8, 1.0)
"""Where all fits begin: beside the heaviest mode, so that this is the one that reverse KL finds."""


@dataclass(frozen=True)
class Demonstration:
    """The three fits."""

    forward_kl: Gaussian
    reverse_kl: Gaussian
    t: np.ndarray
    """float64 [PATH_STEPS + 1], from 0 to 1."""
    taid: list[Gaussian]
    """TAID's Gaussian after the step with each t."""

    def taid_at(self, t: float) -> Gaussian:
        """TAID's Gaussian where t has come to a value within 0 and 1."""
        return self.taid[round(t * PATH_STEPS)]


def demonstrate() -> Demonstration:
    """Fits the Gaussian in the three ways, which takes about a second."""
    target = log_mixture()
    forward, reverse = forward_step(target), reverse_step(target)
    t = np.linspace(0.0, 1.0, PATH_STEPS + 1)
    path, fitted = [], START
    for now in t:
        fitted = taid_step(target, float(now))(fitted)
        path.append(fitted)
    return Demonstration(repeated(forward, START), repeated(reverse, START), t, path)


def log_mixture() -> np.ndarray:
    """Logarithm of the mixture's density on the grid, float64 [points]."""
    return np.logaddexp.reduce([np.log(weight) + mode.log_density() for weight, mode in MODES])


def forward_step(target: np.ndarray) -> Callable[[Gaussian], Gaussian]:
    """A step that lowers KL(p || q). target: log p on the grid."""
    weights = _normalised(target)
    return lambda fitted: fitted.moved(weights)


def reverse_step(target: np.ndarray) -> Callable[[Gaussian], Gaussian]:
    """A step that lowers KL(q || p). target: log p on the grid."""

    def step(fitted: Gaussian) -> Gaussian:
        own = fitted.log_density()
        return fitted.moved(_normalised(own) * (target - own))

    return step


def taid_step(target: np.ndarray, t: float) -> Callable[[Gaussian], Gaussian]:
    """A step that lowers KL(p_t || q) with p_t held fixed, where p_t is q^(1 - t) p^t, normalised (TAID, arXiv 2501.16937).

    target: log p on the grid.
    """
    return lambda fitted: fitted.moved(_normalised((1 - t) * fitted.log_density() + t * target))


def repeated(step: Callable[[Gaussian], Gaussian], fitted: Gaussian) -> Gaussian:
    """The Gaussian after FIT_STEPS steps."""
    for _ in range(FIT_STEPS):
        fitted = step(fitted)
    return fitted


def kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q) in nats, from logarithms of densities on the grid."""
    return float(np.exp(log_p) @ (log_p - log_q)) * SPACING


def share_in_gaps(log_q: np.ndarray) -> float:
    """The probability that q gives to where the mixture's density is below a hundredth of its peak."""
    target = log_mixture()
    return float(np.exp(log_q)[target < target.max() + np.log(0.01)].sum()) * SPACING


def _normalised(log_weights: np.ndarray) -> np.ndarray:
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()
