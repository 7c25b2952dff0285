import json
import math
import random
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from taid_ray.config.objective import ScheduleConfig
from taid_ray.config.training import TrainConfig
from taid_ray.errors import NonFiniteLossError
from taid_ray.scheduler.schedule import ScheduleState, TAIDSchedule, adaptive_is_linear, sigmoid
from taid_ray.student.learning_rate import learning_rate
from tests.support.paths import CURVES_FILE, GOLDEN_FILE

CURVES = json.loads(CURVES_FILE.read_text())["curves"]
GOLDEN = json.loads(GOLDEN_FILE.read_text())["schedule"]
Mode = Literal["adaptive", "normalised", "exponential", "linear", "constant"]
MODES: tuple[Mode, ...] = get_args(Mode)


def make(mode: Mode = "adaptive", total_steps: int = 100, **changes: Any) -> TAIDSchedule:
    """A schedule of any settings, also of those that no configuration may have together."""
    settings = {"t_start": 0.4, "t_end": 1.0, "alpha": 5e-4, "beta": 0.99, "mode": mode} | changes
    return TAIDSchedule(ScheduleConfig.model_construct(**settings), total_steps)


@pytest.mark.parametrize("trace", GOLDEN, ids=lambda trace: f"{trace['kind']}-{trace['adaptive']}")
def test_matches_the_published_code(trace: dict[str, Any]) -> None:
    settings = {key: trace[key] for key in ("t_start", "t_end", "alpha", "beta", "total_steps")}
    schedule = make("adaptive" if trace["adaptive"] else "linear", **settings)
    states = [schedule.update(loss) for loss in trace["loss"]]
    assert [s.t for s in states] == pytest.approx(trace["t"], abs=1e-6)
    assert [s.momentum for s in states] == pytest.approx(trace["momentum"], abs=1e-6)


def test_first_update_only_stores_the_loss() -> None:
    schedule = make()
    assert schedule.state == ScheduleState(
        t=0.4, momentum=0.0, variance=0.0, prev_loss=None, step=0, floor_active=False
    )
    assert schedule.update(3.0) == ScheduleState(t=0.4, momentum=0.0, prev_loss=3.0, step=1, floor_active=False)


def test_second_update_by_hand() -> None:
    schedule = make(alpha=0.5, beta=0.5)
    schedule.update(4.0)
    state = schedule.update(3.0)
    assert state.momentum == pytest.approx(0.125)
    assert state.t == pytest.approx(0.4 + 0.5 * 0.6 / (1 + math.exp(-0.125)))
    assert not state.floor_active


def test_floor_decides_when_the_adaptive_step_is_smaller() -> None:
    schedule = make(alpha=0.0, total_steps=10)
    states = [schedule.update(1.0) for _ in range(3)]
    assert [s.floor_active for s in states] == [False, True, True]
    assert [s.t for s in states] == pytest.approx([0.4, 0.46, 0.52])


def test_linear_is_clamped_after_the_last_step_and_keeps_the_momentum() -> None:
    schedule = make("linear", total_steps=4, beta=0.5, t_end=0.8)
    states = [schedule.update(1 / (n + 1)) for n in range(8)]
    assert [s.t for s in states] == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8])
    assert states[1].momentum == pytest.approx(0.25)


def test_constant_keeps_t_start() -> None:
    schedule = make("constant")
    assert {schedule.update(3.0 - n / 10).t for n in range(20)} == {0.4}


# Mode exponential


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: f"{curve['alpha']}-{curve['sigma']}")
def test_exponential_is_the_seeds_curve_whatever_the_loss(curve: dict[str, Any]) -> None:
    """Its rate is alpha / 2, so alpha sigma needs an alpha of twice that."""
    steps, numbers = curve["total_steps"], random.Random(0)
    schedule = make("exponential", steps, t_start=0.0, alpha=2 * curve["alpha"] * curve["sigma"])
    states = [schedule.update(numbers.uniform(1.0, 5.0)) for _ in range(steps)]
    assert [states[step].t for step in curve["step"]] == pytest.approx(curve["t"], abs=1e-9)
    on_floor = [step for step, state in enumerate(states) if state.floor_active]
    assert (on_floor[0] if on_floor else None) == curve["first_step_on_the_floor"]
    assert on_floor == list(range(on_floor[0], steps) if on_floor else [])


def test_exponential_is_adaptive_where_the_loss_stands_still_one_step_ahead() -> None:
    ahead, behind = make("exponential", 10**9, alpha=0.02), make("adaptive", 10**9, alpha=0.02)
    behind.update(2.0)
    for _ in range(50):
        assert ahead.update(2.0).t == pytest.approx(behind.update(2.0).t, abs=1e-12)


def test_exponential_ends_at_t_end_and_keeps_the_momentum() -> None:
    schedule = make("exponential", t_end=0.6, alpha=0.5, beta=0.5)
    states = [schedule.update(loss) for loss in (4.0, 3.0, 3.0)]
    assert [s.t for s in states] == pytest.approx([0.55, 0.6, 0.6])
    assert states[1].momentum == pytest.approx(0.125)


# Mode normalised


def falling(rate: float, until: int = 100) -> list[float]:
    """100 losses that fall by that share of themselves in every step, then stand still, under noise with a fixed seed."""
    numbers = random.Random(0)
    return [3.0 * (1 - rate) ** min(n, until) * (1 + 0.01 * numbers.gauss(0, 1)) for n in range(100)]


def last_t(mode: Mode, values: list[float], **changes: Any) -> float:
    # 1000 steps, of which the values are the first: the linear floor is far below.
    schedule = make(mode, **{"alpha": 0.02, "total_steps": 1000} | changes)
    return [schedule.update(loss).t for loss in values][-1]


def test_normalised_by_hand() -> None:
    schedule = make("normalised", alpha=0.5, beta=0.75, gain=2.0)
    schedule.update(4.0)
    first = schedule.update(3.0)  # r = 1/4: with one r, u is its sign
    assert (first.momentum, first.variance) == pytest.approx((1 / 16, 1 / 64))
    assert first.t == pytest.approx(0.4 + 0.5 * 0.6 * sigmoid(2.0))
    second = schedule.update(3.3)  # r = -1/10
    m, v = 0.75 / 16 - 0.25 / 10, 0.75 / 64 + 0.25 / 100
    assert (second.momentum, second.variance) == pytest.approx((m, v))
    u = (m / (1 - 0.75**2)) / math.sqrt(v / (1 - 0.75**2))
    assert second.t == pytest.approx(first.t + 0.5 * (1 - first.t) * sigmoid(2.0 * u))


def test_normalised_tells_fast_from_slow_learning_and_adaptive_does_not() -> None:
    fast, slow, none = (falling(rate) for rate in (0.01, 0.001, 0.0))
    ts = [last_t("normalised", values) for values in (fast, slow, none)]
    assert ts == sorted(ts, reverse=True)
    assert ts[0] - ts[1] > 0.05
    ts = [last_t("adaptive", values) for values in (fast, slow, none)]
    assert max(ts) - min(ts) < 0.002


def test_normalised_slows_down_where_the_loss_rises() -> None:
    assert last_t("normalised", falling(-0.01)) < last_t("adaptive", falling(-0.01)) - 0.1


def test_beta_and_gain_matter_in_mode_normalised() -> None:
    burst = falling(0.01, until=30)
    ts = [last_t("normalised", burst, beta=beta) for beta in (0.8, 0.99)]
    assert ts[1] - ts[0] > 0.02  # the longer average remembers the burst for longer
    ts = [last_t("normalised", falling(0.01), gain=gain) for gain in (1.0, 10.0)]
    assert ts[1] - ts[0] > 0.05
    ts = [last_t("adaptive", burst, beta=beta) for beta in (0.8, 0.99)]
    assert abs(ts[0] - ts[1]) < 0.002


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_normalised_does_not_see_the_scale_of_the_loss(scale: float) -> None:
    values = falling(0.003)
    scaled = [scale * value for value in values]
    assert last_t("normalised", scaled) == pytest.approx(last_t("normalised", values), abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99, 1.0])
def test_normalised_goes_at_half_speed_where_the_loss_stands_still(beta: float) -> None:
    values = [2.0] * 50
    assert last_t("normalised", values, beta=beta) == last_t("adaptive", values, beta=beta)


def test_normalised_moves_by_a_share_of_alpha_between_sigmoid_of_minus_and_plus_gain() -> None:
    schedule = make("normalised", alpha=0.02, total_steps=10**9, gain=4.0)
    numbers = random.Random(0)
    schedule.update(1.0)
    for _ in range(2000):
        before = schedule.state.t
        # jumps of many orders of magnitude, and no change at all now and then
        after = schedule.update(schedule.state.prev_loss * numbers.choice([1, 0.5, 1.2, 1e-9, 1e9, 1e-150])).t
        share = (after - before) / (0.02 * (1 - before)) if before < 1 - 1e-6 else 0.5
        assert sigmoid(-4) - 1e-6 <= share <= sigmoid(4) + 1e-6
        schedule.resume(schedule.state._replace(t=0.4, prev_loss=1.0))


def test_other_modes_do_not_see_the_gain() -> None:
    for mode in ("adaptive", "linear", "constant"):
        assert last_t(mode, falling(0.01), gain=1.0) == last_t(mode, falling(0.01), gain=30.0)


def test_the_default_gain_is_that_of_the_configuration() -> None:
    assert last_t("normalised", falling(0.01)) == last_t("normalised", falling(0.01), gain=ScheduleConfig().gain)


def test_a_state_from_before_mode_normalised_continues() -> None:
    schedule, old = make(), make()
    for loss in (3.0, 2.5, 2.4):
        schedule.update(loss)
    state = schedule.state._asdict()
    state.pop("variance")
    old.resume(ScheduleState.from_dict(state))
    assert old.update(2.3).t == schedule.update(2.3).t


# Any mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_leaves_the_state_untouched(mode: Mode, loss: float) -> None:
    schedule = make(mode)
    for good in (3.0, 2.0, 1.0):
        before = schedule.state
        with pytest.raises(NonFiniteLossError):
            schedule.update(loss)
        assert schedule.state == before
        schedule.update(good)


def test_a_relative_change_without_a_finite_value_is_refused() -> None:
    schedule = make()
    before = schedule.update(0.0)
    with pytest.raises(NonFiniteLossError):
        schedule.update(1e300)
    assert schedule.state == before


@pytest.mark.parametrize(
    "changes",
    [
        {"t_start": 0.9, "t_end": 0.5},
        {"t_start": -0.1},
        {"t_end": 1.1},
        {"t_start": math.nan},
        {"alpha": -1e-3},
        {"alpha": 1.5},
        {"beta": -0.1},
        {"beta": 1.01},
        {"mode": "cosine"},
        {"gain": 0.0},
        {"gain": math.inf},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    """By the configuration, so that the schedule need not look at them again."""
    with pytest.raises(ValidationError):
        ScheduleConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"t": math.nan},
        {"t": "0.5"},
        {"momentum": math.inf},
        {"variance": math.nan},
        {"prev_loss": math.nan},
        {"step": None},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(changes: dict[str, Any]) -> None:
    state = make().update(3.0)._asdict()
    assert ScheduleState.from_dict(state)._asdict() == state
    with pytest.raises((ValueError, TypeError)):
        ScheduleState.from_dict(state | changes)


unit = st.floats(0, 1)
losses = st.lists(st.floats(1e-6, 1e3), max_size=30)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, Any], Mode]:
    t_start, t_end = sorted((draw(unit), draw(unit)))
    chosen = {"t_start": t_start, "t_end": t_end, "alpha": draw(unit), "beta": draw(unit)}
    return chosen | {"total_steps": draw(st.integers(1, 40))}, draw(st.sampled_from(MODES))


@settings(max_examples=100, deadline=None)
@given(schedules(), losses)
def test_t_never_falls_nor_leaves_its_range(chosen: tuple[dict[str, Any], Mode], values: list[float]) -> None:
    options, mode = chosen
    schedule = make(mode, **options)
    ts = [schedule.state.t] + [schedule.update(loss).t for loss in values]
    assert ts == sorted(ts)
    assert options["t_start"] == ts[0] and ts[-1] <= options["t_end"]
    assert schedule.state.step == len(values)


@settings(max_examples=100, deadline=None)
@given(schedules(), losses, st.integers(0, 30))
def test_a_restart_changes_nothing(chosen: tuple[dict[str, Any], Mode], values: list[float], cut: int) -> None:
    options, mode = chosen
    whole, first, second = (make(mode, **options) for _ in range(3))
    for loss in values[:cut]:
        first.update(loss)
    second.resume(ScheduleState.from_dict(json.loads(json.dumps(first.state._asdict()))))
    for loss in values[cut:]:
        second.update(loss)
    for loss in values:
        whole.update(loss)
    assert second.state == whole.state


def test_short_adaptive_runs_are_linear() -> None:
    assert adaptive_is_linear(0.4, 1.0, 5e-4, 3999) and not adaptive_is_linear(0.4, 1.0, 5e-4, 4001)
    assert adaptive_is_linear(0.2, 0.9, 0.0, 10**6)


@pytest.mark.parametrize("total_steps", [400, 3000, 5000])
def test_adaptive_is_linear_agrees_with_the_schedule(total_steps: int) -> None:
    schedule = make(total_steps=total_steps)
    floors = [schedule.update(2.0).floor_active for _ in range(total_steps)]
    assert all(floors[1:]) == adaptive_is_linear(0.4, 1.0, 5e-4, total_steps)


@pytest.mark.parametrize("gain", [0.5, 10.0])
def test_short_normalised_runs_are_linear(gain: float) -> None:
    """Even if every loss falls, which makes u its largest, 1."""
    longest = int(1 / (5e-4 * sigmoid(gain)))
    assert adaptive_is_linear(0.4, 1.0, 5e-4, longest, gain) and not adaptive_is_linear(
        0.4, 1.0, 5e-4, longest + 1, gain
    )
    for steps, linear in ((longest, True), (longest + 100, False)):
        schedule = make("normalised", total_steps=steps, gain=gain)
        floors = [schedule.update(3.0 * 0.999**n).floor_active for n in range(steps)]
        assert all(floors[1:]) == linear


def rates(shape: str, warmup: int, total: int) -> list[float]:
    config = TrainConfig(steps=total, learning_rate=2.0, warmup_steps=warmup, lr_schedule=shape)
    return [learning_rate(step, config, total) for step in range(total + 1)]


def test_learning_rate_by_hand() -> None:
    assert rates("linear", 2, 6) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0])
    assert rates("cosine", 0, 4) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0])
    assert rates("constant", 4, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0])
    assert rates("cosine", 3, 3) == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])


def test_learning_rate_stays_zero_after_the_end() -> None:
    assert learning_rate(20, TrainConfig(steps=10), 10) == 0
