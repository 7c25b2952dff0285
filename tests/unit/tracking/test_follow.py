"""What trackers are given is what the run's files hold: each step once, in order, whatever fails or is restarted."""

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.driver.progress import ProgressView
from taid_ray.errors import ConfigError
from taid_ray.files import read_lines, write_lines
from taid_ray.run.directory import RunManifest, write_config
from taid_ray.run.metrics import LineLog, StepMetrics, metrics_log
from taid_ray.tracking import follow as tracking
from taid_ray.tracking.follow import Follower, check_installed, tell_stopped, tracking_session
from taid_ray.tracking.sinks import MLflow, Outcome, Point, TensorBoard, WeightsAndBiases, point
from taid_ray.tracking.tail import MetricsTail
from tests.support.journal import WITHIN_S, Journal

FIGURES = [name for name in StepMetrics.__dataclass_fields__ if name not in ("step", "sources")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "POLL_S", 0.01)
    monkeypatch.setattr(tracking, "AGAIN_S", 0.02)


def metrics(step: int, salt: float = 0.0) -> StepMetrics:
    values = {name: (place + 1) * step / 7 + salt for place, name in enumerate(FIGURES)}
    return StepMetrics(step=step, **values)  # type: ignore[arg-type]


def test_figures_of_sources_have_names_of_their_own() -> None:
    found = point({"step": 3, "loss": 1.5, "sources": {"wiki": {"loss": 2, "tokens": 7}}}, "train")
    assert found == (3, {"train/loss": 1.5, "train/source wiki/loss": 2.0, "train/source wiki/tokens": 7.0})


def write_steps(run_dir: Path, first: int, last: int, salt: float = 0.0, log: LineLog | None = None) -> LineLog:
    log = log or metrics_log(run_dir / "metrics.jsonl", first - 1)
    for step in range(first, last + 1):
        log.write(metrics(step, salt).line())
    return log


def write_validations(run_dir: Path, *steps: int) -> None:
    write_lines(
        run_dir / "validation.jsonl", [{"step": step, "cross_entropy": step + 0.5, "kl": 0.25} for step in steps]
    )


class Memory:
    """A tracker that can be out of order, and tells of what it is given and, meanwhile, of what it refuses."""

    def __init__(self, rewrites_history: bool = False, known: int = -1):
        self.rewrites_history, self.known = rewrites_history, known
        self.points, self.refused = Journal(), Journal()
        self.closed: list[Outcome] = []
        self.broken = False

    def send(self, points: list[Point]) -> None:
        if self.broken:
            self.refused.append(points)
            raise ConnectionError("no route to host\nand a long story")
        self.points += points

    def close(self, outcome: Outcome) -> None:
        if self.broken:
            raise ConnectionError("no route to host")
        self.closed.append(outcome)

    @property
    def steps(self) -> list[int]:
        return [step for step, figures in self.points if "train/loss" in figures]

    def wait_for(self, steps: list[int]) -> None:
        self.points.wait(lambda _: self.steps == steps)


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=300)


@pytest.fixture
def follow(tmp_path: Path, console: Console) -> Iterator[Callable[[Any], Follower]]:
    """Starts to follow the run in tmp_path."""
    with ProgressView(console) as view:
        yield lambda tracker: started(Follower("memory", tmp_path, lambda: tracker, view))


def started(follower: Follower) -> Follower:
    follower.start()
    return follower


def finish(follower: Follower, outcome: Outcome) -> None:
    follower.end(outcome)
    follower.wait(time.monotonic() + WITHIN_S, WITHIN_S)


def test_every_step_arrives_once_and_in_order_while_the_files_grow(tmp_path: Path, follow: Any) -> None:
    memory = Memory()
    follower = follow(memory)
    write_validations(tmp_path, 0)
    log = write_steps(tmp_path, 1, 700)  # more than are read at a time
    memory.wait_for([*range(1, 701)])
    write_validations(tmp_path, 0, 700)
    write_steps(tmp_path, 701, 703, log=log)
    finish(follower, "finished")
    assert memory.steps == list(range(1, 704))
    assert [step for step, figures in memory.points if "validation/kl" in figures] == [0, 700]
    assert [each.step for each in memory.points] == sorted(each.step for each in memory.points)
    assert memory.closed == ["finished"]
    figures = next(figures for step, figures in memory.points if step == 5 and "train/loss" in figures)
    assert figures == point(read_lines(tmp_path / "metrics.jsonl")[4], "train").figures
    assert {"train/t", "train/tokens_per_s", "time/step_s", "time/teacher_wait_s"} < set(figures)


def test_a_line_that_is_being_written_waits(tmp_path: Path, follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, peeks, peek = Memory(), Journal(), MetricsTail.peek

    def told(figures: MetricsTail) -> list[Point]:
        peeks.append(peek(figures))
        found: list[Point] = peeks[-1]
        return found

    monkeypatch.setattr(MetricsTail, "peek", told)
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1, "loss": 2.0})
    path.write_text(line[:9])
    follower = follow(memory)
    peeks.wait_length(5)
    assert not memory.points and not any(peeks)
    with path.open("a") as file:
        file.write(line[9:] + "\n" + line[:4])
    memory.wait_for([1])
    finish(follower, "stopped")
    assert memory.steps == [1]


def test_what_a_tracker_has_already_is_not_sent_again(tmp_path: Path, follow: Any) -> None:
    """A resumed run's files begin at its first step; and restarted workers write steps again that were sent before."""
    memory = Memory(known=4)
    write_validations(tmp_path, 0, 5)
    write_steps(tmp_path, 1, 8)
    follower = follow(memory)
    memory.wait_for([5, 6, 7, 8])
    write_steps(tmp_path, 6, 10, salt=0.1)
    finish(follower, "finished")
    assert memory.steps == [5, 6, 7, 8, 9, 10]


def test_the_validation_of_the_last_known_step_is_made_up_for(tmp_path: Path) -> None:
    """A driver that is killed during a validation has sent the step's line already."""
    write_validations(tmp_path, 0, 5)
    write_steps(tmp_path, 1, 6).close()
    figures = MetricsTail(tmp_path)
    figures.begin(5)
    figures.restarted()
    assert [(step, "validation/kl" in found) for step, found in figures.peek()] == [(5, True), (6, False)]
    figures.commit()
    assert not figures.peek()


def test_an_outage_is_told_once_and_made_up_for(tmp_path: Path, follow: Any, console: Console) -> None:
    memory = Memory()
    follower = follow(memory)
    log = write_steps(tmp_path, 1, 3)
    memory.wait_for([1, 2, 3])
    memory.broken = True
    write_steps(tmp_path, 4, 6, log=log)
    memory.refused.wait_length(5)
    assert follower.missing is not None
    memory.broken = False
    memory.wait_for([1, 2, 3, 4, 5, 6])
    finish(follower, "finished")
    text = console.export_text()
    assert text.count("what follows step 3 has not arrived (ConnectionError: no route to host); the run goes on") == 1
    assert text.count("everything has arrived again") == 1
    assert memory.steps == [1, 2, 3, 4, 5, 6] and follower.missing is None


def test_an_outage_to_the_end_is_in_the_summary(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    monkeypatch.setattr(tracking, "MLflow", lambda *given: memory)
    with (
        ProgressView(console) as view,
        tracking_session(config_of(tmp_path, mlflow="x"), "run-1", False, view) as tracking_,
    ):
        log = write_steps(tmp_path, 1, 2)
        memory.wait_for([1, 2])
        memory.broken = True
        write_steps(tmp_path, 3, 3, log=log)
        summary = tracking_.finished({"steps": 3})
    assert list(summary["not_tracked"]) == ["mlflow"]
    assert summary["not_tracked"]["mlflow"].startswith("what follows step 2 has not arrived")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert "metrics.jsonl has all figures" in console.export_text()


def test_a_run_in_order_leaves_its_summary_alone(tmp_path: Path, console: Console) -> None:
    with ProgressView(console) as view, tracking_session(config_of(tmp_path), "run-1", False, view) as tracking_:
        write_steps(tmp_path, 1, 2)
        assert tracking_.finished({"steps": 2}) == {"steps": 2}
    assert not (tmp_path / "summary.json").exists()
    assert sorted(board(tmp_path)["train/loss"]) == [1, 2]


@pytest.mark.parametrize(
    ("error", "outcome"), [(ValueError("x"), "failed"), (KeyboardInterrupt(), "stopped"), (SystemExit(143), "stopped")]
)
def test_trackers_hear_how_a_run_ended(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, error: BaseException, outcome: str
) -> None:
    memory = Memory()
    monkeypatch.setattr(tracking, "WeightsAndBiases", lambda *given: memory)
    with (
        pytest.raises(type(error)),
        ProgressView(console) as view,
        tracking_session(config_of(tmp_path, wandb="x"), "run-1", False, view),
    ):
        raise error
    assert memory.closed == [outcome]


def test_what_a_stopped_trial_did_not_pass_on_arrives(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune ends the process of a trial, which then neither sends its last lines nor says that it is over."""
    memory, runs = Memory(known=3), []
    monkeypatch.setattr(tracking, "WeightsAndBiases", lambda project, run, *given: runs.append(run) or memory)
    config = config_of(tmp_path, wandb="x")
    write_config(config)
    RunManifest(config).write()
    write_steps(tmp_path, 1, 5).close()
    with ProgressView(console) as view:
        tell_stopped(tmp_path, view)
    assert runs == [RunManifest(config).id]
    assert memory.steps == [4, 5] and memory.closed == ["stopped"]
    assert sorted(board(tmp_path)["train/loss"]) == [1, 2, 3, 4, 5]


def test_a_new_run_that_is_refused_ends_and_a_resumed_one_goes_on(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, away, tries = Memory(known=2), [True], Journal()

    def begin(*given: Any) -> Memory:
        tries.append(given)
        if away[0]:
            raise PermissionError("no API key")
        return memory

    monkeypatch.setattr(tracking, "WeightsAndBiases", begin)
    config = config_of(tmp_path, wandb="x")
    with ProgressView(console) as view:
        with pytest.raises(ConfigError, match=r"tracking.wandb: .*no API key.*remove tracking.wandb"):  # noqa: SIM117
            with tracking_session(config, "run-1", False, view):
                pytest.fail("it was to be refused")
        write_steps(tmp_path, 1, 5)
        with tracking_session(config, "run-1", True, view):
            tries.wait_length(5)
            away[0] = False
            memory.wait_for([3, 4, 5])
    assert console.export_text().count("(PermissionError: no API key); the run goes on") == 1


def test_a_tracker_that_is_open_is_closed_where_another_one_refuses_the_run(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its run would be shown as one that goes on."""

    def refuses(*given: Any) -> Memory:
        raise PermissionError("no such experiment")

    memory = Memory()
    monkeypatch.setattr(tracking, "WeightsAndBiases", lambda *given: memory)
    monkeypatch.setattr(tracking, "MLflow", refuses)
    config = config_of(tmp_path, wandb="x", mlflow="y")
    with ProgressView(console) as view, pytest.raises(ConfigError, match=r"tracking.mlflow: .*no such experiment"):  # noqa: SIM117
        with tracking_session(config, "run-1", False, view):
            pytest.fail("it was to be refused")
    assert memory.closed == ["failed"]
    left = {thread.name for thread in threading.enumerate() if thread.is_alive()}
    assert not left & {"taid-wandb", "taid-mlflow", "taid-tensorboard"}


def test_trackers_close_side_by_side_and_a_stop_does_not_wait_long(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two waits for the other one, and with them a third one never ends."""
    together, never = threading.Barrier(2), threading.Event()

    class Slow(Memory):
        def close(self, outcome: Outcome) -> None:
            together.wait(WITHIN_S)
            super().close(outcome)

    class Stuck(Memory):
        def close(self, outcome: Outcome) -> None:
            never.wait(WITHIN_S)

    memories = [Slow(), Slow(), Stuck()]
    monkeypatch.setattr(tracking, "STOPPED_CLOSE_S", 5.0)
    with ProgressView(console) as view:
        followers = [started(Follower(f"memory-{n}", tmp_path, lambda m=m: m, view)) for n, m in enumerate(memories)]
        tracking.Tracking(followers, tmp_path).close("stopped")
    never.set()
    assert [memory.closed for memory in memories] == [["stopped"], ["stopped"], []]
    assert [follower.missing for follower in followers] == [None, None, "it did not take everything within 5 s"]


def test_trials_are_grouped_by_their_search(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(tracking, "MLflow", lambda *arguments: given.append(arguments) or Memory())
    (tmp_path / "search.yaml").write_text("id: search-1\n")
    trial = tmp_path / "trials" / "001"
    trial.mkdir(parents=True)
    for run_dir in (trial, tmp_path):
        with ProgressView(console) as view, tracking_session(config_of(run_dir, mlflow="x"), "run-1", False, view):
            pass
    assert [(experiment, run, group) for experiment, run, _, group in given] == [
        ("x", "run-1", "search-1"),
        ("x", "run-1", None),
    ]


def test_a_missing_package_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as W&B leaves it where it worked
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    check_installed(config_of(tmp_path))
    for name in ("wandb", "mlflow"):
        with pytest.raises(ConfigError, match=rf"tracking.{name}: .*pip install 'taid-ray\[{name}\]'"):
            check_installed(config_of(tmp_path, **{name: "project"}))


def config_of(run_dir: Path, **where: str) -> DistillConfig:
    return build_config(
        {
            "name": "demo",
            "out": str(run_dir),
            "teacher": {"model": "t"},
            "student": {"init": "cut", "layers": [0]},
            "data": {"train": "d"},
            "train": {"steps": 10},
            "tracking": where,
        }
    )


def board(run_dir: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: value by step, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (run_dir / "tensorboard").is_dir():
        return {}
    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    names = found.Tags()["scalars"]
    shown = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in names}
    assert all(len(dict(events)) == len(events) for events in shown.values()), "a step is there twice"
    return {name: dict(events) for name, events in shown.items()}


def test_tensorboard_shows_what_the_files_hold_after_any_restart(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that go on from a checkpoint, then another driver, and some steps with other figures than before."""
    config, shown, send = config_of(tmp_path), Journal(), TensorBoard.send

    def told(tracker: TensorBoard, points: list[Point]) -> None:
        send(tracker, points)
        shown.extend(step for step, figures in points if "train/loss" in figures)

    monkeypatch.setattr(TensorBoard, "send", told)
    with ProgressView(console) as view:
        with tracking_session(config, "run-1", False, view):
            write_validations(tmp_path, 0)
            write_steps(tmp_path, 1, 6)
            shown.wait_for(6)
            write_steps(tmp_path, 4, 9, salt=0.5).close()
            write_validations(tmp_path, 0, 8)
        with tracking_session(config, "run-1", True, view):
            write_steps(tmp_path, 7, 12, salt=0.25).close()
    lines = [point(line, "train") for line in read_lines(tmp_path / "metrics.jsonl")]
    lines += [point(line, "validation") for line in read_lines(tmp_path / "validation.jsonl")]
    expected: dict[str, dict[int, float]] = {}
    for step, figures in lines:
        for name, value in figures.items():
            expected.setdefault(name, {})[step] = pytest.approx(value)
    assert board(tmp_path) == expected
    assert len(expected["train/loss"]) == 12 and set(expected["validation/kl"]) == {0, 8}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_takes_little_time(tmp_path: Path) -> None:
    """It is written in the driver; 10 ms of a processor's time a step are far more than it needs."""
    tracker = TensorBoard(tmp_path)
    points = [point({"step": step} | dict.fromkeys(FIGURES, 1.0), "train") for step in range(200)]
    start = time.process_time()
    tracker.send(points)
    assert time.process_time() - start < 2.0
    tracker.close("finished")


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(None)
    points = [point({"step": step, "loss": 1 / step, "step_s": 0.5}, "train") for step in range(1, 2001)]
    first = MLflow("demo", "run-1", config_of(tmp_path), "search-1")
    assert first.known == -1
    first.send(points[:1500])
    first.close("stopped")
    second = MLflow("demo", "run-1", config_of(tmp_path), "search-1")
    assert second.known == 1500
    second.send(points[1500:])
    second.close("finished")
    (run,) = mlflow.MlflowClient().search_runs(["1"])
    assert run.info.status == "FINISHED" and run.data.tags["taid_ray.search"] == "search-1"
    assert run.data.params["student.layers"] == "[0]"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert {each.step: each.value for each in history} == {step: 1 / step for step in range(1, 2001)}
    other = MLflow("demo", "run-2", config_of(tmp_path), None)
    assert other.known == -1
    other.close("failed")


def test_wandb_gets_every_step_under_the_run_s_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = WeightsAndBiases("project-1", "run-1", config_of(tmp_path), "search-1")
    assert tracker.known == -1 and tracker.address == ""
    tracker.send([Point(step, {"train/loss": step / 4}) for step in range(3)])
    tracker.send([Point(2, {"validation/kl": 0.5}), Point(3, {"train/loss": 0.75})])
    tracker.send([Point(1, {"validation/kl": 9.0})])  # a step that it has left: no error, and nothing changes
    tracker.close("finished")
    records = list(wandb_records(next(tmp_path.glob("wandb/offline-run-*/*.wandb"))))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.run_group, run.display_name) == ("run-1", "project-1", "search-1", "demo")
    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["_step"], row["train/loss"]) for row in rows] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert rows[2]["validation/kl"] == 0.5 and "validation/kl" not in rows[1]


def wandb_records(path: Path) -> Iterator[Any]:
    """Of a file that W&B writes offline: a header of 7 bytes, then blocks of 32 KiB with parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32_768 - position % 32_768
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack("<4xHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
