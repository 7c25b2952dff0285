"""How many replicas a pool gets, and what `taid-ray scale` says to a wrong command. No Ray runs."""

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from taid_ray.cli import app as cli
from taid_ray.config.fields import Range
from taid_ray.run.layout import CONFIG_FILE, LIVE_FILE, SUMMARY_FILE
from taid_ray.teacher.pool import autoscaling
from taid_ray.teacher.pool.autoscaling import DOWN_S, UP_S, Autoscaler, LoadMeter
from taid_ray.teacher.pool.lease import Lease

INFO: Any = SimpleNamespace(probe_digest="p")


class Pool:
    """Replicas that start and stop at once, under a load that the test sets; a decision every half second."""

    def __init__(self, low: int, high: int):
        self.scaler = Autoscaler(Range(min=low, max=high), UP_S, DOWN_S)
        self.now, self.replicas = 100.0, low

    def run(self, seconds: float, load: float, running: int | None = None) -> int:
        for _ in range(round(2 * seconds)):
            self.now += 0.5
            found = self.replicas if running is None else running
            self.replicas = self.scaler.decide(self.now, load, found, self.replicas)
        return self.replicas


def test_queued_requests_double_the_replicas_within_seconds_until_the_load_fits() -> None:
    pool = Pool(1, 8)
    assert pool.run(UP_S - 1, 12.0) == 1
    assert pool.run(1.5, 12.0) == 2
    assert pool.run(UP_S - 1, 12.0) == 2  # judged anew, with two
    assert pool.run(1.5, 12.0) == 4
    assert pool.run(600, 3.6) == 4
    assert pool.run(60, 7.0) == 7
    assert pool.run(60, 100.0) == 8


def test_never_more_than_the_load_or_the_range() -> None:
    assert Pool(3, 8).run(60, 3.5) == 3
    assert Pool(2, 5).run(7, 2.6) == 3
    assert Pool(3, 3).run(600, 50.0) == 3
    assert Pool(3, 3).run(600, 0.0) == 3


def test_idle_replicas_leave_slowly_and_those_needed_stay() -> None:
    pool = Pool(1, 4)
    assert pool.run(30, 40.0) == 4
    assert pool.run(DOWN_S - 1, 2.3) == 4
    assert pool.run(2, 2.3) == 3
    assert pool.run(600, 2.3) == 3  # two would not do
    assert pool.run(600, 0.0) == 1


def test_bursts_are_judged_by_their_mean() -> None:
    pool = Pool(1, 4)
    for _ in range(100):
        pool.run(2, 2.5)
        assert pool.run(3, 0.0) == 1


def test_replicas_that_still_start_are_waited_for() -> None:
    pool = Pool(1, 8)
    assert pool.run(UP_S + 1, 12.0) == 2
    assert pool.run(600, 12.0, running=1) == 2
    assert pool.run(60, 0.0, running=1) == 1  # they are not if nobody needs them any more
    assert pool.run(1, 0.0) == 1


def test_load_is_the_mean_over_time() -> None:
    meter = LoadMeter(10.0)
    meter.add(1, 10.5)
    meter.add(1, 10.75)
    assert meter.read(11.0) == pytest.approx(0.25 + 2 * 0.25)
    meter.add(-1, 11.5)
    assert meter.read(12.0) == pytest.approx(1.5)
    assert meter.read(12.0) == 1.0
    meter.add(-1, 12.0)
    assert meter.read(13.0) == 0.0


def lease(low: int, high: int) -> Lease:
    return Lease("pool", 600.0, Autoscaler(Range(min=low, max=high), UP_S, DOWN_S))


def test_a_number_asked_for_by_hand_holds_whatever_the_load() -> None:
    found = lease(1, 2)
    assert found.replicas(1) == 1
    assert found.set_replicas(5) is None
    assert found.replicas(1) == found.replicas(5) == 5
    assert found.set_replicas(2) == 5
    assert found.replicas(5) == 2


def test_a_number_that_could_not_be_had_leaves_the_decision_to_the_load_again() -> None:
    found = lease(1, 2)
    assert found.replicas(1) == 1
    before = found.set_replicas(5)
    assert found.replicas(1) == 5
    found.set_replicas(before)
    assert found.replicas(5) == 2, "no more than the configuration allows, although Serve tries to reach five"


def test_a_restarted_lease_keeps_what_was_asked_for() -> None:
    assert lease(1, 1).replicas(3) == 3
    found = lease(2, 2)
    assert found.replicas(1) == found.replicas(2) == 1


def test_replicas_learn_that_their_pool_is_removed() -> None:
    found = lease(1, 1)
    found.register(INFO)
    assert found.report_load("a", 0.5) == "go on"
    found.end()
    assert found.report_load("a", 0.5) == "over"


def test_a_restarted_lease_asks_replicas_who_they_are() -> None:
    found = lease(1, 1)
    assert found.report_load("a", 0.5) == "register"
    found.register(INFO)
    assert found.report_load("a", 0.5) == "go on" and found.first() is INFO


def test_a_pool_that_is_taken_over_forgets_why_replicas_failed_before() -> None:
    found = Lease("pool", 600.0, Autoscaler(Range(min=1, max=1), UP_S, DOWN_S), spec="this")
    found.report_failure(RuntimeError("full"))  # type: ignore[arg-type]
    assert not found.renew_if("that") and found.failure() is not None
    assert found.renew_if("this") and found.failure() is None


def test_a_new_number_forgets_why_replicas_failed_before() -> None:
    found = lease(1, 1)
    found.report_failure(RuntimeError("full"))  # type: ignore[arg-type]
    found.set_replicas(2)
    assert found.failure() is None


def run_dir(directory: Path, live: dict[str, Any] | None = None, **teacher: Any) -> Path:
    tree = {
        "out": str(directory),
        "teacher": {"model": "t"} | teacher,
        "student": {"model": "s"},
        "data": {"train": "d"},
        "train": {"steps": 1},
    }
    (directory / CONFIG_FILE).write_text(yaml.safe_dump(tree))
    if live is not None:
        here = {
            "address": "127.0.0.1:9",
            "auth_mode": None,
            "pool": "p",
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        (directory / LIVE_FILE).write_text(json.dumps(here | live))
    return directory


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `taid-ray scale` prints on its way out with code 2."""
    monkeypatch.setattr(sys, "argv", ["taid-ray", "scale", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("count", ["0", "-3"])
def test_scale_to_nothing(
    count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(monkeypatch, capsys, str(run_dir(tmp_path)), f"--teacher={count}")
    assert f"at least one replica (found {count})" in message


def test_scale_without_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--teacher" in refusal(monkeypatch, capsys, str(tmp_path))


def test_scale_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        assert f"{path} is not a run directory" in refusal(monkeypatch, capsys, str(path), "--teacher", "2")


def test_scale_a_local_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(monkeypatch, capsys, str(run_dir(tmp_path, mode="local")), "--teacher", "2")
    assert "no teacher pool to scale" in message and "teacher.mode: pool" in message


def test_scale_a_run_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(run_dir(tmp_path)), "--teacher", "2")
    assert f"is not alive: it left no {LIVE_FILE}" in refusal(monkeypatch, capsys, *arguments)
    run_dir(tmp_path, {"pid": 2**22 + 1})  # above the largest process id
    assert "its driver, process 4194305, died" in refusal(monkeypatch, capsys, *arguments)
    run_dir(tmp_path, {"host": "another-host"})
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever other tests have left connected
    assert "127.0.0.1:9, where it was, does not answer" in refusal(monkeypatch, capsys, *arguments)
    (tmp_path / SUMMARY_FILE).write_text("{}")
    assert "it is finished" in refusal(monkeypatch, capsys, *arguments)


def test_a_lease_that_cannot_be_asked_is_told_of_once_per_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autoscaling that stands still must not be invisible; a message twice a second would be."""
    failures = iter([RuntimeError("one"), RuntimeError("two"), OSError("three"), RuntimeError("four"), ValueError()])
    told: list[str] = []

    def get_actor(name: str, namespace: str) -> None:
        raise next(failures)

    logger = SimpleNamespace(warning=lambda message, cause: told.append(cause))
    monkeypatch.setattr(autoscaling, "POLL_S", 0.0)
    monkeypatch.setattr(autoscaling.ray, "get_actor", get_actor)
    monkeypatch.setattr(autoscaling, "logging", SimpleNamespace(getLogger=lambda name: logger))
    policy = autoscaling.PoolPolicy.__new__(autoscaling.PoolPolicy)
    policy._current = policy._wanted = 2
    policy._follow("lease", "taid-ray")  # ends where the pool is gone, by the ValueError
    assert told == ["RuntimeError: one", "OSError: three"] and policy._wanted == 2
