"""The interpolation t over a run, as plain Python floats."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from taid_ray.errors import ConfigError, NonFiniteLossError

Mode = Literal["adaptive", "normalised", "linear", "constant"]
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
        t     = min(t_end, floor)                                               mode linear
        t     = t_start                                                         mode constant

    u is Adam's quotient: both averages divided by 1 - beta^n, which makes up for their start at 0. It lies within
    [-1, 1] (Cauchy-Schwarz) and does not depend on the scale of the loss. Raises ConfigError for settings that make no sense.
    """

    def __init__(
        self,
        t_start: float,
        t_end: float,
        alpha: float,
        beta: float,
        total_steps: int,
        mode: Mode = "adaptive",
        gain: float = 10.0,
    ) -> None:
        for name, value in {"t_start": t_start, "t_end": t_end, "alpha": alpha, "beta": beta}.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"schedule.{name} must lie within [0, 1], found {value}")
        if t_start > t_end:
            raise ConfigError(f"schedule.t_start = {t_start} is above schedule.t_end = {t_end}; lower t_start")
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(f"the schedule needs a whole number of steps, at least 1; found {total_steps}")
        if mode not in get_args(Mode):
            raise ConfigError(f"schedule.mode = {mode!r} is unknown; use one of {', '.join(get_args(Mode))}")
        if not (_is_finite(gain) and gain > 0):
            raise ConfigError(f"schedule.gain must be a number above 0, found {gain}")
        self._t_start, self._t_end = float(t_start), float(t_end)
        self._alpha, self._beta, self._gain = float(alpha), float(beta), float(gain)
        self._total_steps, self._mode = total_steps, mode
        self._state = ScheduleState(t=self._t_start)

    @property
    def state(self) -> ScheduleState:
        return self._state

    def update(self, loss: float) -> ScheduleState:
        """Takes the global loss of one optimizer step and returns the state whose t the next step uses.

        Raises NonFiniteLossError, leaving the state as it was, if the loss or its relative change is not finite.
        """
        loss, old = float(loss), self._state
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss of optimizer step {old.step + 1} is {loss}; t stays {old.t}")
        if old.prev_loss is None:
            self._state = old._replace(prev_loss=loss, step=old.step + 1)
            return self._state
        fall = _relative_fall(old.prev_loss, loss)
        momentum = self._beta * old.momentum + (1 - self._beta) * fall
        variance = self._beta * old.variance + (1 - self._beta) * fall * fall
        t, floor_active = self._next_t(old, momentum, variance)
        self._state = ScheduleState(t, momentum, variance, loss, old.step + 1, floor_active)
        return self._state

    def _next_t(self, old: ScheduleState, momentum: float, variance: float) -> tuple[float, bool]:
        if self._mode == "constant":
            return self._t_start, False
        floor = self._t_start + (self._t_end - self._t_start) * old.step / self._total_steps
        if self._mode == "linear":
            return min(self._t_end, floor), True
        x = momentum if self._mode == "adaptive" else self._gain * self._normalised(momentum, variance, old.step)
        adaptive = old.t + self._alpha * sigmoid(x) * (1 - old.t)
        return min(self._t_end, max(floor, adaptive)), floor > adaptive

    def _normalised(self, momentum: float, variance: float, falls: int) -> float:
        """u after that many relative falls."""
        scale = math.sqrt(variance * (1 - self._beta**falls))
        return max(-1.0, min(1.0, momentum / scale)) if scale else 0.0  # rounding would pass 1

    def state_dict(self) -> dict[str, Any]:
        """The state as a mapping that JSON can hold without loss."""
        return self._state._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`. Raises ConfigError, changing nothing, if that is no state of this schedule."""
        state = {"variance": 0.0} | dict(state)  # checkpoints from before mode normalised have none
        if set(state) != set(ScheduleState._fields):
            raise ConfigError(
                f"a schedule state has the keys {', '.join(ScheduleState._fields)}; found {', '.join(state)}"
            )
        new = ScheduleState(**state)
        if not (_is_finite(new.t) and self._t_start <= new.t <= self._t_end):
            raise ConfigError(
                f"the saved schedule has t = {new.t}, outside [{self._t_start}, {self._t_end}]; "
                "restore schedule.t_start and schedule.t_end of the run that saved it"
            )
        if not (_is_finite(new.momentum) and _is_finite(new.variance) and new.variance >= 0):
            raise ConfigError(
                f"the saved schedule has momentum = {new.momentum} and variance = {new.variance}; both are finite numbers, "
                "the variance not below 0"
            )
        if type(new.step) is not int or new.step < 0:
            raise ConfigError(f"the saved schedule has step = {new.step!r}, which is not a count")
        if not (new.prev_loss is None if new.step == 0 else _is_finite(new.prev_loss)):
            raise ConfigError(
                f"the saved schedule has prev_loss = {new.prev_loss} at step {new.step}; step 0 alone has none"
            )
        if not isinstance(new.floor_active, bool):
            raise ConfigError(f"the saved schedule has floor_active = {new.floor_active!r}, which is not true or false")
        self._state = new


def adaptive_is_linear(t_start: float, t_end: float, alpha: float, total_steps: int, gain: float = 0.0) -> bool:
    """Whether the adaptive rule cannot leave its linear floor in a run of this length, so that it equals mode linear.

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


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
