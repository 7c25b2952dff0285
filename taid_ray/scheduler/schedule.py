"""The interpolation t over a run, as plain Python floats."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from taid_ray.config.objective import ScheduleConfig
from taid_ray.errors import NonFiniteLossError

_EPSILON = 1e-15  # of the published code, in the relative change of the loss


class ScheduleState(NamedTuple):
    """Everything the next update depends on, besides the settings."""

    t: float
    """Interpolation for the next optimizer step."""
    momentum: float = 0.0
    """Moving average of the relative fall of the loss."""
    variance: float = 0.0
    """Moving average of the square of that fall (around 0, not around the average)."""
    prev_loss: float | None = None
    """Loss of the last update, None before the first."""
    step: int = 0
    """Updates so far, which is also the 0-based index of the optimizer step whose loss comes next."""
    floor_active: bool = False
    """Whether the linear floor, not the adaptive rule, decided t in the last update."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ScheduleState":
        """Reads what `_asdict` gave, on the way through JSON.

        Checkpoints from before mode normalised have no variance. Raises ValueError or TypeError for anything else.
        """
        state = cls(**values)
        numbers = (state.t, state.momentum, state.variance, state.prev_loss or 0.0, state.step)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"a state of the schedule holds finite numbers, found {dict(values)}")
        return state


class TAIDSchedule:
    """Moves t from t_start to t_end (TAID, arXiv 2501.16937, section 3.2; details as in the published code).

    For the loss of step n (0-based) of total_steps; the first loss is only stored:

        r     = (prev_loss - loss) / (prev_loss + 1e-15)
        m     = beta * m + (1 - beta) * r
        v     = beta * v + (1 - beta) * r^2
        u     = m / sqrt(v * (1 - beta^n)), or 0 where v is 0
        floor = t_start + (t_end - t_start) * n / total_steps
        t     = min(t_end, max(floor, t + alpha * sigmoid(m) * (1 - t)))        mode adaptive
        t     = min(t_end, max(floor, t + alpha * sigmoid(gain * u) * (1 - t))) mode normalised
        t     = min(t_end, max(floor, 1 - (1 - t_start) (1 - alpha/2)^(n + 1))) mode exponential
        t     = min(t_end, floor)                                               mode linear
        t     = t_start                                                         mode constant

    u is Adam's quotient: both averages divided by 1 - beta^n, which makes up for their start at 0. It lies within
    [-1, 1] (Cauchy-Schwarz) and does not depend on the scale of the loss. Mode exponential is the adaptive rule with 1/2
    in place of the sigmoid; it needs no loss, so t moves after the first one already.
    """

    def __init__(self, config: ScheduleConfig, total_steps: int) -> None:
        """total_steps: optimizer steps of the whole run, at least 1."""
        self._config, self._total_steps = config, total_steps
        self._state = ScheduleState(t=config.t_start)

    @property
    def state(self) -> ScheduleState:
        return self._state

    def update(self, loss: float) -> ScheduleState:
        """Takes the global loss of one optimizer step and returns the state whose t the next step uses.

        Raises NonFiniteLossError, leaving the state as it was, if the loss or its relative change is not finite.
        """
        config, old = self._config, self._state
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss of optimizer step {old.step + 1} is {loss}; t stays {old.t}")
        if old.prev_loss is None:
            t, floor_active = self._next_t(old, 0.0, 0.0) if config.mode == "exponential" else (old.t, False)
            self._state = old._replace(t=t, prev_loss=loss, step=old.step + 1, floor_active=floor_active)
            return self._state
        fall = _relative_fall(old.prev_loss, loss)
        momentum = config.beta * old.momentum + (1 - config.beta) * fall
        variance = config.beta * old.variance + (1 - config.beta) * fall * fall
        t, floor_active = self._next_t(old, momentum, variance)
        self._state = ScheduleState(t, momentum, variance, loss, old.step + 1, floor_active)
        return self._state

    def _next_t(self, old: ScheduleState, momentum: float, variance: float) -> tuple[float, bool]:
        """The next t, and whether the linear floor decided it."""
        config = self._config
        if config.mode == "constant":
            return config.t_start, False
        floor = config.t_start + (config.t_end - config.t_start) * old.step / self._total_steps
        if config.mode == "linear":
            return min(config.t_end, floor), True
        if config.mode == "exponential":
            return above_floor(exponential(config.t_start, config.alpha / 2, old.step + 1), floor, config.t_end)
        x = momentum if config.mode == "adaptive" else config.gain * self._normalised(momentum, variance, old.step)
        return above_floor(approach(old.t, config.alpha * sigmoid(x)), floor, config.t_end)

    def _normalised(self, momentum: float, variance: float, falls: int) -> float:
        """The quotient u after `falls` relative falls."""
        scale = math.sqrt(variance * (1 - self._config.beta**falls))
        return max(-1.0, min(1.0, momentum / scale)) if scale else 0.0  # rounding would pass 1

    def resume(self, state: ScheduleState) -> None:
        """Continues from `state`, which a schedule of the same settings was in."""
        self._state = state


def approach(t: float, rate: float) -> float:
    """t, moved by the share `rate` of its distance from 1."""
    return t + rate * (1 - t)


def exponential(t_start: float, rate: float, updates: int) -> float:
    """`approach` repeated from t_start on, in closed form: 1 - (1 - t_start) (1 - rate)^updates."""
    return 1 - (1 - t_start) * (1 - rate) ** updates


def above_floor(t: float, floor: float, t_end: float) -> tuple[float, bool]:
    """t, raised to the linear floor and capped at t_end, and whether the floor decided."""
    return min(t_end, max(floor, t)), floor > t


def adaptive_is_linear(t_start: float, t_end: float, alpha: float, total_steps: int, gain: float = 0.0) -> bool:
    """Tests whether the adaptive rule cannot leave its linear floor in a run of this length, and so equals mode linear.

    It cannot where even its first step at full speed, alpha sigmoid(gain) (1 - t_start), is no larger than the floor's,
    (t_end - t_start) / total_steps. gain: that of mode normalised; 0 for mode adaptive, whose sigmoid(m) strays from
    1/2 by less than 0.001 at the default beta.
    """
    return alpha * total_steps * (1 - t_start) * sigmoid(gain) <= t_end - t_start


def _relative_fall(prev_loss: float, loss: float) -> float:
    base = prev_loss + _EPSILON
    fall = (prev_loss - loss) / base if base else math.inf
    if not math.isfinite(fall * fall):
        raise NonFiniteLossError(f"the loss went from {prev_loss} to {loss}, a relative change without a finite value")
    return fall


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
