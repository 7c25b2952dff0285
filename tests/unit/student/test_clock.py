import pytest
import torch

from taid_ray.student.clock import PhaseClock


class Timer:
    """Time that passes when it is told to, in steps that floating point adds exactly."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.phases = PhaseClock(torch.device("cpu"), lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def timer() -> Timer:
    return Timer()


def test_an_inner_phase_is_taken_out_of_the_outer_one(timer: Timer) -> None:
    with timer.phases.phase("forward"):
        timer.work(2)
        with timer.phases.phase("loss"):
            timer.work(5)
        timer.work(4)
    timer.work(0.5)
    with timer.phases.phase("forward"):
        timer.work(8)
    assert timer.phases.lap() == {"step": 19.5, "forward": 14, "loss": 5}


def test_a_lap_starts_where_the_last_one_ended(timer: Timer) -> None:
    with timer.phases.phase("data"):
        timer.work(2)
    first = timer.phases.lap()
    with timer.phases.phase("backward"):
        timer.work(1)
        middle = timer.phases.lap()  # also inside a phase
        timer.work(3)
    last = timer.phases.lap()
    assert first == {"step": 2, "data": 2}
    assert middle == {"step": 1, "backward": 1}
    assert last == {"step": 3, "backward": 3}


def test_a_phase_ends_with_an_exception_too(timer: Timer) -> None:
    with pytest.raises(StopIteration), timer.phases.phase("data"):
        timer.work(1)
        raise StopIteration
    timer.work(2)
    with timer.phases.phase("forward"):
        timer.work(4)
    assert timer.phases.lap() == {"step": 7, "data": 1, "forward": 4}


def test_the_time_is_that_of_the_wall_without_another_clock() -> None:
    phases = PhaseClock(torch.device("cpu"))
    with phases.phase("data"):
        pass
    seconds = phases.lap()
    assert 0 < seconds["data"] <= seconds["step"]
