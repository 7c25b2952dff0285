"""What Ray Train leaves behind if its controller is killed in its first seconds."""

import pytest
import ray
from ray._private.state import state
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

from taid_ray.driver import orphans
from tests.support.waiting import wait_until


@pytest.mark.more
@pytest.mark.timeout(600)
def test_a_cleaner_that_nobody_told_to_watch_is_ended(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        orphans, "QUERY_S", 60
    )  # a search for orphans that takes longer gives up, as nothing depends on it
    monkeypatch.setattr(orphans, "END_S", 60.0)
    cleaner = ray.remote(num_cpus=0)(PlacementGroupCleaner).options(lifetime="detached")
    cleaner.remote(controller_actor_id="gone", check_interval_s=1.0, get_actor_timeout_s=1.0, stop_timeout=1.0)
    wait_until(lambda: orphans._alive(orphans.CLEANER), "a cleaner")
    assert len(orphans.own_job().split("/")[1]) == len(next(iter(state.job_table()))["JobID"])
    with orphans.ending_orphaned_cleaners():
        pass
    wait_until(lambda: not orphans._alive(orphans.CLEANER), "the end of the cleaner")
