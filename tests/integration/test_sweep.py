"""What Ray Train leaves behind if its controller is killed in its first seconds."""

import time

import ray
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

from taid_ray.driver import sweep


def test_a_cleaner_that_nobody_told_to_watch_is_ended(ray_cluster: str) -> None:
    cleaner = ray.remote(num_cpus=0)(PlacementGroupCleaner).options(lifetime="detached")
    cleaner.remote(controller_actor_id="gone", check_interval_s=1.0, get_actor_timeout_s=1.0, stop_timeout=1.0)
    deadline = time.monotonic() + 60
    while not sweep._alive(sweep.CLEANER):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with sweep.swept():
        pass
    while sweep._alive(sweep.CLEANER):
        assert time.monotonic() < deadline
        time.sleep(0.2)
