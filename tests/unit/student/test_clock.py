import time

import pytest
import torch

from taid_ray.student.clock import PhaseClock


def test_an_inner_phase_is_taken_out_of_the_outer_one() -> None:
    clock = PhaseClock(torch.device("cpu"))
    with clock.phase("forward"):
        time.sleep(0.02)
        with clock.phase("loss"):
            time.sleep(0.05)
        time.sleep(0.02)
    time.sleep(0.03)
    with clock.phase("forward"):
        time.sleep(0.01)
    seconds = clock.lap()
    assert 0.05 <= seconds["forward"] < 0.07 and 0.05 <= seconds["loss"] < 0.07
    assert 0.03 <= seconds["step"] - seconds["forward"] - seconds["loss"] < 0.05
    assert set(seconds) == {"step", "forward", "loss"}


def test_a_lap_starts_where_the_last_one_ended() -> None:
    clock = PhaseClock(torch.device("cpu"))
    with clock.phase("data"):
        time.sleep(0.02)
    first = clock.lap()
    with clock.phase("backward"):
        time.sleep(0.01)
        middle = clock.lap()  # also inside a phase
        time.sleep(0.03)
    last = clock.lap()
    assert first["data"] == pytest.approx(0.02, abs=0.015) and "data" not in middle
    assert 0.01 <= middle["backward"] < 0.025 and 0.03 <= last["backward"] < 0.045
    assert last["step"] == pytest.approx(last["backward"], abs=0.005)


def test_a_phase_ends_with_an_exception_too() -> None:
    clock = PhaseClock(torch.device("cpu"))
    with pytest.raises(StopIteration), clock.phase("data"):
        raise StopIteration
    with clock.phase("forward"):
        pass
    assert set(clock.lap()) == {"step", "data", "forward"}
