from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from taid_ray.config.space import Space
from taid_ray.search.tuning import sampled, scheduler


def space(**values: Any) -> Space:
    return Space.model_validate({"space": {"schedule.beta": {"uniform": [0.5, 0.9]}}} | values)


def test_spaces_and_schedulers_in_ray_tunes_words() -> None:
    grid = space(search="grid", space={"schedule.beta": {"choice": [0.5, 0.9]}})
    assert sampled(grid) == {"schedule.beta": {"grid_search": [0.5, 0.9]}}
    kinds = {
        "a": {"uniform": [0, 1]}, "b": {"loguniform": [1, 2]}, "c": {"quniform": [0, 1, 0.5]}, "d": {"qloguniform": [1, 8, 1]},
        "e": {"randint": [0, 5]}, "f": {"lograndint": [1, 5]}, "g": {"choice": ["x", "y"]},
    }  # fmt: skip
    drawn = {key: found.sample() for key, found in sampled(space(space=kinds)).items()}
    assert 0 <= drawn["a"] < 1 <= drawn["b"] < 2 and drawn["c"] in (0, 0.5, 1) and 1 <= drawn["d"] <= 8
    assert drawn["e"] in range(5) and drawn["f"] in range(1, 5) and drawn["g"] in "xy"
    assert isinstance(scheduler(space(), 100), FIFOScheduler)
    assert isinstance(scheduler(space(scheduler="asha"), 100), ASHAScheduler)
    assert isinstance(scheduler(space(scheduler="median"), 100), MedianStoppingRule)
