import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_ray.scheduler.curves import Ramp, simulate
from tests.support.paths import CURVES_FILE

GOLDEN = json.loads(CURVES_FILE.read_text())["curves"]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{golden['alpha']}-{golden['sigma']}")
def test_matches_the_seeds_numbers(golden: dict[str, Any]) -> None:
    ramp = Ramp(golden["total_steps"], t_start=golden["t_init"], t_end=1.0, floor_from=0.0)
    curve = simulate(golden["alpha"], golden["sigma"], ramp)
    assert len(curve.t) == golden["total_steps"]
    assert [curve.t[step] for step in golden["step"]] == pytest.approx(golden["t"], abs=1e-9)
    assert [ramp.floor(step) for step in golden["step"]] == pytest.approx(golden["linear_floor"], abs=1e-9)
    closed = [curve.closed_form(step) for step in golden["step"]]
    assert closed == pytest.approx(golden["closed_form_n_plus_1_updates"], abs=1e-9)
    assert curve.floor_step == golden["first_step_on_the_floor"]


def test_by_hand_with_a_start_an_end_and_a_floor_of_its_own() -> None:
    curve = simulate(0.5, 0.5, Ramp(steps=4, t_start=0.2, t_end=0.9, floor_from=0.1))
    # 0.2 + 0.8 / 4, then + 0.6 / 4, then + 0.45 / 4, then the floor, 0.1 + 0.8 * 3 / 4 = 0.7, is above 0.6625 + 0.084
    assert curve.t == pytest.approx([0.4, 0.55, 0.6625, 0.746875])
    assert curve.floor_step is None
    low = simulate(0.1, 0.5, Ramp(steps=4, t_start=0.2, t_end=0.9, floor_from=0.1))
    assert low.t == pytest.approx([0.24, 0.3, 0.5, 0.7]) and low.floor_step == 1
    assert low.closed_form(1) == pytest.approx(1 - 0.8 * 0.95**2)


unit = st.floats(0.001, 1)


@settings(max_examples=100, deadline=None)
@given(unit, unit, st.integers(1, 60), st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_t_is_the_larger_of_closed_form_and_floor(alpha: float, sigma: float, steps: int, places: list[float]) -> None:
    """Wherever the floor begins no higher than t: from where it takes over, its steps are the larger ones."""
    floor_from, t_start, t_end = places
    ramp = Ramp(steps, t_start, t_end, floor_from)
    curve = simulate(alpha, sigma, ramp)
    for step, t in enumerate(curve.t):
        assert t == pytest.approx(min(t_end, max(curve.closed_form(step), ramp.floor(step))), abs=1e-9)
        assert step == 0 or t >= curve.t[step - 1]
