"""Whose left-over actors are ended, without Ray: this run's own, never those of others on the same cluster."""

from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.driver import orphans
from taid_ray.driver.orphans import CLEANER, CONTROLLER, ending_orphaned_cleaners

OWN, FORMER, FORMER_ALIVE, STRANGER, STRANGER_OVER, SAME_ID_ELSEWHERE = "01", "02", "03", "04", "05", "06"
CLEANERS = (OWN, FORMER, FORMER_ALIVE, STRANGER, STRANGER_OVER, SAME_ID_ELSEWHERE)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs whose cleaners were ended."""
    ended: list[str] = []

    def remote(**options: Any) -> Any:
        return lambda function: SimpleNamespace(options=lambda **where: SimpleNamespace(remote=ended.append))

    context = SimpleNamespace(get_session_name=lambda: "session_b", get_job_id=lambda: OWN)
    ray = SimpleNamespace(get_runtime_context=lambda: context, remote=remote, get=lambda answer, timeout: answer)
    monkeypatch.setattr(orphans, "ray", ray)
    monkeypatch.setattr(orphans, "dead_jobs", lambda: {FORMER, STRANGER_OVER, SAME_ID_ELSEWHERE})
    monkeypatch.setattr(orphans, "NodeAffinitySchedulingStrategy", lambda node, soft: None)
    return ended


def alive(*controllers: str) -> Any:
    """The State API of a cluster with a cleaner of every job, and controllers of some. A job stands for its process's id."""

    def find(class_name: str) -> list[Any]:
        jobs = {CLEANER: CLEANERS, CONTROLLER: controllers}[class_name]
        return [SimpleNamespace(job_id=job, node_id="n", pid=job) for job in jobs]

    return find


FORMER_JOBS = {f"session_b/{FORMER}", f"session_b/{FORMER_ALIVE}", f"session_a/{SAME_ID_ELSEWHERE}"}


def test_only_what_this_run_started_is_ended(monkeypatch: pytest.MonkeyPatch, ended: list[str]) -> None:
    monkeypatch.setattr(orphans, "_alive", alive())
    with ending_orphaned_cleaners(FORMER_JOBS):
        assert not ended
    assert ended == [OWN, FORMER]


def test_not_while_a_controller_of_this_job_lives(monkeypatch: pytest.MonkeyPatch, ended: list[str]) -> None:
    """Another trial of the same search, for example."""
    monkeypatch.setattr(orphans, "_alive", alive(OWN))
    with ending_orphaned_cleaners(FORMER_JOBS):
        pass
    assert ended == [FORMER]
