"""What `status` says of a directory, and what `stop` does with it: states, figures, and what is too old to be believed."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.cli import app as cli
from taid_ray.control import stop as stopping
from taid_ray.control.state import Seen, state_of
from taid_ray.control.status import RECENT_STEPS, read_status
from taid_ray.control.stop import stop
from taid_ray.driver import live as driver_side
from taid_ray.errors import ClusterError, ConfigError, RunError
from taid_ray.files import TAIL
from taid_ray.run.directory import locked
from taid_ray.run.layout import (
    ENDED_FILE,
    LIVE_FILE,
    LOCK_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    TRIALS,
    VALIDATION_FILE,
)
from taid_ray.run.live import SILENT_S, live_pool
from taid_ray.run.metrics import OF_TEACHER
from tests.support.journal import WITHIN_S
from tests.support.run_files import ELSEWHERE, HERE, NOBODY, ended, line, run_dir, search_dir


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_states_of_a_run(tmp_path: Path) -> None:
    def state(name: str, **content: Any) -> tuple[str, str | None]:
        found = read_status(run_dir(tmp_path / name, **content))
        return found.state, found.why

    assert state("a", steps=4, live=ELSEWHERE) == ("training", None)
    assert state("b", live=ELSEWHERE) == ("starting", None)
    assert state("c", steps=4, live=replace(ELSEWHERE, began=time.time() + 60)) == ("starting", None)  # a resumed one
    assert state("d", steps=4, ended=ended("stopped")) == ("stopped", None)
    assert state("e", steps=4, ended=ended("failed", "no room")) == ("failed", "no room")
    assert state("f", steps=40, summary={"steps": 40}) == ("finished", None)
    assert state("g", steps=4) == ("dead", "its driver ended without saying why")
    assert state("h", steps=4, live=HERE) == ("dead", f"its driver, process {HERE.pid}, died")


SEEN = Seen(live=True, death=None, begun=True, ended=None, locked=False, complete=False)
FAILED = {"how": "failed", "error": "no room"}


@pytest.mark.parametrize(
    ("changes", "run", "search"),
    [
        ({}, "training", "searching"),
        ({"begun": False}, "starting", "starting"),
        ({"complete": True}, "finished", "finishing"),
        ({"death": "gone"}, "dead", "dead"),
        ({"death": "gone", "ended": FAILED}, "dead", "dead"),
        ({"death": "gone", "complete": True}, "finished", "dead"),
        ({"live": False, "ended": FAILED}, "failed", "failed"),
        ({"live": False, "ended": {"how": "stopped", "error": None}}, "stopped", "stopped"),
        ({"live": False, "ended": FAILED, "complete": True}, "finished", "failed"),
        ({"live": False}, "dead", "stopped"),
        ({"live": False, "locked": True}, "starting", "starting"),
        ({"live": False, "locked": True, "complete": True}, "finished", "finishing"),
        ({"live": False, "locked": True, "ended": FAILED}, "failed", "failed"),
        ({"live": False, "complete": True}, "finished", "finished"),
        ({"given_up": True, "death": "gone"}, "stopped", "stopped"),
    ],
)
def test_the_table_of_states(changes: dict[str, Any], run: str, search: str) -> None:
    assert state_of(replace(SEEN, **changes))[0] == run
    assert state_of(replace(SEEN, search=True, **changes))[0] == search


def test_a_driver_that_has_just_taken_the_directory(tmp_path: Path) -> None:
    """The one before was killed; what it left must not be taken for this one's."""
    run = run_dir(tmp_path, steps=4, live=HERE)
    assert read_status(run).state == "dead"
    with locked(run):
        assert read_status(run).state == "starting" and read_status(run).driver is None
    assert read_status(run).state == "dead"


def test_a_driver_that_closes_down(tmp_path: Path) -> None:
    """Trackers and Ray may take minutes, after live.json has gone."""
    run = run_dir(tmp_path / "run", steps=4)
    for how, error in (("stopped", None), ("failed", "no room")):
        with locked(run):
            (run / ENDED_FILE).write_text(json.dumps(ended(how, error)))
            assert (read_status(run).state, read_status(run).why) == (how, error)
    search = search_dir(tmp_path / "S", "finished", "stopped")
    with locked(search):
        assert read_status(search).state == "finishing"
    assert read_status(search).state == "finished"


def test_a_driver_elsewhere_is_believed_as_long_as_it_gives_signs(tmp_path: Path) -> None:
    run = run_dir(tmp_path, steps=4, live=ELSEWHERE)
    age(run / LIVE_FILE, SILENT_S / 2)
    assert read_status(run).state == "training"
    age(run / LIVE_FILE, SILENT_S + 10)
    found = read_status(run)
    told = re.search(r"on another-host, has given no sign of life for (\d+) s", found.headline)
    assert found.state == "dead" and told and 70 <= int(told[1]) < 100
    with pytest.raises(ConfigError, match="no sign of life"):
        live_pool(run)


def test_a_driver_that_holds_its_lock_is_not_dead(tmp_path: Path) -> None:
    run = run_dir(tmp_path / "run", steps=4)
    with locked(run):
        run_dir(run, steps=4, live=HERE)
        age(run / LIVE_FILE, SILENT_S + 10)  # its disk may hang
        assert read_status(run).state == "training"
    age(run / LIVE_FILE, 0)
    assert read_status(run).state == "dead"


def test_what_versions_before_left_can_be_read(tmp_path: Path) -> None:
    run = run_dir(tmp_path / "run", steps=4)
    old = asdict(ELSEWHERE) | {"namespace": "pid:[4026531836]", "process": "boot-1234"}
    (run / LIVE_FILE).write_text(json.dumps(old))
    assert read_status(run).driver == ELSEWHERE
    for text in ("[]", json.dumps({"host": "h"})):
        (run / LIVE_FILE).write_text(text)
        with pytest.raises(RunError, match=r"live\.json is damaged"):
            read_status(run)


def test_figures_are_those_of_the_last_steps(tmp_path: Path) -> None:
    run = run_dir(tmp_path, steps=RECENT_STEPS + 10, live=replace(ELSEWHERE, total_steps=60))
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 31, "t"')  # being written
    age(run / METRICS_FILE, 3000)
    (run / VALIDATION_FILE).write_text(json.dumps({"step": 25, "kl": 0.5, "cross_entropy": 2.0, "rows": 9}) + "\n")
    found = read_status(run)
    assert (found.step, found.total_steps, found.t, found.kl) == (30, 60, 0.3, 1.0)
    assert found.step_s == 1.5 and found.tokens_per_s == pytest.approx(500 / 1.5)  # ten of 1 s, ten of 2 s
    assert found.left_s == pytest.approx(30 * 1.5) and found.teacher_wait_share == pytest.approx(0.25)
    assert found.step_age_s == pytest.approx(3000, abs=60)
    assert found.validation == {"step": 25, "kl": 0.5, "cross_entropy": 2.0}


def test_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    run = run_dir(tmp_path, steps=3000, live=ELSEWHERE)
    assert (run / METRICS_FILE).stat().st_size > 2 * TAIL
    found = read_status(run)
    assert (found.step, found.step_s) == (3000, 2.0)


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    run = run_dir(tmp_path, steps=3, live=HERE)
    with (run / METRICS_FILE).open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(RunError, match=rf"{METRICS_FILE} is damaged"):
        read_status(run)


def test_a_torn_checkpoint_does_not_count(tmp_path: Path) -> None:
    run = run_dir(tmp_path, steps=4, live=HERE)
    assert read_status(run).checkpoint is None

    def checkpoint(step: int, ranks: int) -> None:
        path = run / "checkpoints" / f"step-{step:09d}-{1:020d}"
        path.mkdir(parents=True)
        for rank in range(ranks):
            (path / f"rank-{rank:05d}.json").write_text(json.dumps({"rank": rank, "world_size": 2}))

    checkpoint(10, 2)
    checkpoint(20, 1)
    found = read_status(run).checkpoint
    assert found is not None and found.step == 10 and found.age_s < 60


def test_a_search(tmp_path: Path) -> None:
    found = read_status(search_dir(tmp_path / "S", "failed", "running", live=ELSEWHERE))
    assert (found.state, found.trials) == ("searching", {"failed": 1, "running": 1, "all": 2})
    starting = replace(ELSEWHERE, address=None)
    assert read_status(search_dir(tmp_path / "R", "failed", "waiting", live=starting)).state == "starting"
    assert read_status(search_dir(tmp_path / "Q", "failed", "finished", live=ELSEWHERE)).state == "finishing"
    assert read_status(search_dir(tmp_path / "T", "finished", "stopped")).state == "finished"
    assert read_status(search_dir(tmp_path / "U", "finished", "waiting")).state == "stopped"  # by a signal


def test_a_trial_that_its_search_stopped_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Tune killed its process, which could say nothing."""
    search = search_dir(tmp_path / "S", "stopped", "failed", "stopped", live=ELSEWHERE)
    (search / TRIALS).mkdir()
    killed = replace(HERE, total_steps=60)
    first, second = (run_dir(search / TRIALS / name, steps=4, live=killed) for name in ("0001", "0002"))
    (first / LOCK_FILE).touch()
    found = read_status(first)
    assert found.headline == (
        "stopped after step 4 of 60: its search stopped it early, others are better; nothing goes on with it"
    )
    assert (found.state, found.driver) == ("stopped", None)
    assert read_status(second).state == "dead"
    assert read_status(run_dir(search / TRIALS / "0003", steps=40, summary={"steps": 40})).state == "finished"
    monkeypatch.chdir(first)
    assert read_status(Path()).state == "stopped"


def test_what_is_neither(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="what `taid-ray train`, `tune` or `submit` was given as --out"):
            read_status(path)


def test_the_driver_leaves_word_of_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_side, "dashboard_address", lambda: "head:8265")
    monkeypatch.setattr(driver_side.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="head:6379"))
    monkeypatch.setattr(driver_side, "BEAT_S", 0.01)
    touched, utime = threading.Event(), os.utime

    def touch(path: Path) -> None:
        utime(path)
        touched.set()

    monkeypatch.setattr(
        driver_side, "os", SimpleNamespace(utime=touch, getpid=lambda: HERE.pid, environ={"RAY_AUTH_MODE": "token"})
    )
    run = run_dir(tmp_path, live=replace(HERE, total_steps=99), ended=ended("failed", "before"))  # that was killed
    with locked(run):
        with pytest.raises(SystemExit), driver_side.liveness_file(run):
            assert not (run / ENDED_FILE).exists()
            found = read_status(run)
            assert (found.state, found.driver and found.driver.address) == ("starting", None)
            with pytest.raises(ConfigError, match="it has not joined a cluster yet"):
                live_pool(run)
            driver_side.announce_cluster(run, "p", 7)
            (run / METRICS_FILE).write_text(json.dumps(line(1)) + "\n")
            found = read_status(run)
            assert (found.state, found.total_steps) == ("training", 7)
            assert live_pool(run).address == "head:6379" and live_pool(run).auth_mode == "token"
            age(run / LIVE_FILE, 1000)
            touched.clear()
            assert touched.wait(WITHIN_S), "no sign of life"
            assert time.time() - (run / LIVE_FILE).stat().st_mtime < 500
            raise SystemExit(143)
        found = read_status(run)
        assert (found.state, found.total_steps) == ("stopped", 7) and not (run / LIVE_FILE).exists()
        with pytest.raises(ConfigError), driver_side.liveness_file(run):
            raise ConfigError("loss.name: wrong")
        assert (read_status(run).state, read_status(run).why) == ("failed", "loss.name: wrong")
        with driver_side.liveness_file(run):
            (run / SUMMARY_FILE).write_text('{"steps": 4}')
        assert read_status(run).state == "finished" and not (run / ENDED_FILE).exists()


DRIVER = """
import pathlib, signal, sys
from taid_ray.run.directory import locked
def end(number, frame):
    pathlib.Path(sys.argv[1], "live.json").unlink()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
with locked(pathlib.Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A driver that has the lock of the run directory RUN, and ends itself at SIGTERM."""
    run = run_dir(tmp_path / "RUN", steps=4)
    command = [sys.executable, "-c", DRIVER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        (run / LIVE_FILE).write_text(json.dumps(asdict(replace(HERE, pid=process.pid))))
        try:
            yield process
        finally:
            process.kill()


def test_stop_ends_a_driver_of_this_host(tmp_path: Path, driver: "subprocess.Popen[bytes]") -> None:
    run, said = tmp_path / "RUN", list[str]()
    (run / ENDED_FILE).write_text(json.dumps(ended("stopped")))
    stop(run, None, said.append)
    assert driver.wait(WITHIN_S) == 143
    assert said[0] == f"asked process {driver.pid} to stop; it saves a checkpoint after its step"
    assert said[-1] == "stopped after step 4 of 50; the same command goes on with it"


def test_stop_waits_for_a_driver_that_is_starting(
    tmp_path: Path, driver: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has joined its cluster, a signal would end it where it stands."""
    run, said = tmp_path / "RUN", list[str]()
    monkeypatch.setattr(stopping, "POLL_S", 0.01)
    joined = json.loads((run / LIVE_FILE).read_text())
    (run / LIVE_FILE).write_text(json.dumps(joined | {"address": None}))
    (run / ENDED_FILE).write_text(json.dumps(ended("stopped")))

    def notify(message: str) -> None:
        if not said:
            assert driver.poll() is None
            (run / LIVE_FILE).write_text(json.dumps(joined))
        said.append(message)

    stop(run, None, notify)
    assert driver.wait(WITHIN_S) == 143
    assert said[0] == "it is being started; waiting until it can be asked" and said[1].startswith("asked process")


def test_stop_gives_up_a_driver_that_never_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "JOIN_S", 0.0)
    monkeypatch.setattr(stopping, "POLL_S", 0.01)
    run = run_dir(tmp_path, live=replace(ELSEWHERE, address=None))
    with pytest.raises(
        ClusterError, match=rf"has not joined a cluster within 0 s; end process {NOBODY} on another-host"
    ):
        stop(run, None, print)
    (run / LIVE_FILE).unlink()
    with locked(run), pytest.raises(ClusterError, match="has not joined a cluster"):
        stop(run, None, print)


def test_stop_of_a_zombie_returns(
    tmp_path: Path, driver: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has waited for the dead driver; only root may look at what it has open."""
    run, said, looks = tmp_path / "RUN", list[str](), []
    (run / ENDED_FILE).write_text(json.dumps(ended("stopped")))

    def has_open(pid: int, file: Any) -> bool:
        looks.append(pid)
        if len(looks) > 1:
            driver.wait(WITHIN_S)
            raise PermissionError
        return True

    monkeypatch.setattr(stopping, "has_open", has_open)
    stop(run, None, said.append)
    assert said[-1] == "stopped after step 4 of 50; the same command goes on with it"


def test_stop_touches_no_process_but_the_driver(tmp_path: Path, driver: "subprocess.Popen[bytes]") -> None:
    """A later one with the same id, or that of another container of this host's name."""
    run = tmp_path / "RUN"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        (run / LIVE_FILE).write_text(json.dumps(asdict(replace(HERE, pid=bystander.pid))))
        with pytest.raises(ConfigError, match=rf"process {bystander.pid} on .*, so it cannot be reached from here"):
            stop(run, None, print)
        assert bystander.poll() is None and driver.poll() is None
        bystander.communicate(b"\n")
        assert bystander.returncode == 0


def test_stop_where_there_is_nothing_to_stop(tmp_path: Path) -> None:
    said: list[str] = []
    stop(run_dir(tmp_path / "a", steps=40, summary={"steps": 40}), None, said.append)
    stop(run_dir(tmp_path / "b", steps=4, live=HERE), None, said.append)
    assert said[0] == "nothing to stop: finished after step 40 of 40"
    assert said[1].startswith("nothing to stop: dead after step 4 of 40: its driver")


def test_stop_where_it_cannot_reach(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"process {NOBODY} on another-host, and no Ray job.*`kill {NOBODY}` there"):
        stop(run_dir(tmp_path / "a", steps=4, live=ELSEWHERE), None, print)
    trials = search_dir(tmp_path / "S", "running", live=ELSEWHERE) / TRIALS
    trials.mkdir()
    with pytest.raises(ConfigError, match=re.escape(f"is a trial of a search; stop the search, {tmp_path}/S")):
        stop(run_dir(trials / "0001", steps=4, live=ELSEWHERE), None, print)


def test_scale_a_trial_of_a_shared_pool(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="uses the teacher pool of its search; scale that one"):
        live_pool(run_dir(tmp_path, steps=4, live=replace(ELSEWHERE, pool=None)))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_dir(tmp_path, steps=30, live=replace(ELSEWHERE, submission="taid-job"))

    def output(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["taid-ray", "status", str(run), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    found = json.loads(output("--json"))
    assert (found["state"], found["step"], found["teacher_replicas"]) == ("training", 30, None)
    shown = output()
    for part in (
        "state       training",
        "30 of 40",
        "t 0.3000",
        "333 tokens/s",
        "25% of it waiting",
        "Ray job taid-job",
    ):
        assert part in shown


def test_a_run_without_a_teacher_has_no_figures_of_one(tmp_path: Path) -> None:
    from taid_ray.cli.control import rows

    run = run_dir(tmp_path / "run", steps=4, live=ELSEWHERE)
    without = [{key: value for key, value in line(step).items() if key not in OF_TEACHER} for step in range(1, 5)]
    (run / METRICS_FILE).write_text("".join(json.dumps(each) + "\n" for each in without))
    (run / VALIDATION_FILE).write_text('{"step": 0, "cross_entropy": 3.0, "tokens": 9}\n')
    found = read_status(run)
    assert (found.t, found.kl, found.teacher_wait_share) == (None, None, None) and found.loss is not None
    shown = dict(rows(found, None))
    assert shown["figures"] == "loss 2.9600 (nats per token)"
    assert shown["speed"] == "500 tokens/s, 1 s a step"
    assert shown["validation"] == "cross-entropy 3.0000 after step 0"
