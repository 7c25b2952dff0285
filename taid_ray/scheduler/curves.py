"""The course of t at a fixed sigmoid: the rule without a loss, its closed form, and where the linear floor takes over."""

from collections.abc import Sequence
from dataclasses import dataclass

from taid_ray.scheduler.schedule import above_floor, approach, exponential


@dataclass(frozen=True)
class Ramp:
    """What all simulated curves have in common. Raises nothing: its maker has checked the values."""

    steps: int
    """Optimizer steps of the run, at least 1."""
    t_start: float
    """t before the first step."""
    t_end: float
    """Largest t, which the floor would reach after the last step."""
    floor_from: float
    """Where the linear floor begins: t_start in TAID."""

    def floor(self, step: int) -> float:
        """The linear floor under t after a 0-based step."""
        return self.floor_from + (self.t_end - self.floor_from) * step / self.steps


@dataclass(frozen=True)
class Curve:
    """The course of t at one alpha and one value of the sigmoid."""

    alpha: float
    sigma: float
    """Value of the sigmoid in every step: 1/2 where the loss does not fall, almost 1 where it falls as fast as can be."""
    ramp: Ramp
    t: Sequence[float]
    """t after each 0-based step."""
    floor_step: int | None
    """First 0-based step in which the linear floor decided t; None if none did."""

    def closed_form(self, step: int) -> float:
        """t after a 0-based step if there were neither a floor nor t_end: 1 - (1 - t_start) (1 - alpha sigma)^(step + 1)."""
        return exponential(self.ramp.t_start, self.alpha * self.sigma, step + 1)


def simulate(alpha: float, sigma: float, ramp: Ramp) -> Curve:
    """Repeats t = min(t_end, max(floor, t + alpha sigma (1 - t))), once per step.

    As in the reference numbers t moves after the first step already; a run, whose first loss has no other to be compared
    with, lags one step behind. alpha, sigma: above 0, at most 1.
    """
    t, floor_step, values = ramp.t_start, None, []
    for step in range(ramp.steps):
        t, on_floor = above_floor(approach(t, alpha * sigma), ramp.floor(step), ramp.t_end)
        values.append(t)
        if on_floor and floor_step is None:
            floor_step = step
    return Curve(alpha, sigma, ramp, values, floor_step)
