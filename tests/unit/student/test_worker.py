"""A student worker's start and end, as far as they can be seen without a cluster."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.checkpoint.save import CheckpointWriter
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.distributed.world import World
from taid_ray.driver.preflight import prepare
from taid_ray.errors import CheckpointError, ModelError, RunError
from taid_ray.models.dropout import uses_dropout
from taid_ray.models.head import hidden_states
from taid_ray.run.directory import run_directory
from taid_ray.scheduler.aggregate import LossAggregator, LossSums, StepResult
from taid_ray.scheduler.schedule import TAIDSchedule
from taid_ray.student import context, engine, open_teacher
from taid_ray.student.spec import Finished, Outcome, WorkerSpec
from taid_ray.student.worker import run_worker
from tests.support.store import prepare_here
from tests.support.students import TIED, config_for


class Reached(Exception):
    """The worker has come as far as the test looks."""


@pytest.mark.parametrize(("rank", "local_rank", "probes"), [(0, 0, [0]), (3, 3, []), (8, 0, [8])])
def test_one_worker_of_a_node_tries_to_write_to_the_run_directory(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, probes: list[int]
) -> None:
    """A thousand files made and removed at once would be a burden for a shared file system."""

    class SchedulerClient:
        def __init__(self, *given: Any):
            self.note = print

        def close(self) -> None:
            closed.append("scheduler")

        def begin(self, attempt: int, world_size: int) -> None:
            raise Reached

    class Elsewhere(World):
        def barrier(self) -> None:
            raise Reached

    tried: list[int] = []
    closed: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(context, "World", SimpleNamespace(current=lambda: Elsewhere(rank, 16)))
    monkeypatch.setattr(context, "SchedulerClient", SchedulerClient)
    monkeypatch.setattr(context, "check_run_dir_writable", lambda run_dir, rank: tried.append(rank))
    spec: Any = SimpleNamespace(config=config_for(TIED), spec=None, device="cpu", scheduler=None, attempt=1)
    with pytest.raises(Reached):
        run_worker(spec)
    assert tried == probes and closed == ["scheduler"]


def test_a_teacher_that_is_refused_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool's client has a thread, and keeps the pool's lease alive for as long as it is open."""

    class Teacher:
        closed = False

        def info(self) -> Any:
            raise ModelError("teacher.model: no packed rows")

        def close(self) -> None:
            self.closed = True

    teacher, spec = Teacher(), SimpleNamespace(config=config_for(TIED))
    monkeypatch.setattr(open_teacher, "connect_teacher", lambda *_: teacher)
    place: Any = SimpleNamespace(config=spec.config, note=print)
    with pytest.raises(ModelError), ExitStack() as closing:
        open_teacher.open_teacher(place, SimpleNamespace(), closing)  # type: ignore[arg-type]
    assert teacher.closed


class LocalScheduler:
    """What the scheduler actor and its client do, for one rank in the same process."""

    def __init__(self, aggregator: LossAggregator, *_: Any):
        self.aggregator = aggregator
        self.sums_are_finite = True

    def begin(self, attempt: int, world_size: int) -> None:
        self.attempt = attempt

    def join(self, attempt: int, world_size: int, start: StepResult | None) -> StepResult:
        self.aggregator.begin(attempt, world_size, start)
        return self.aggregator.result

    def submit(self, step: int, sums: LossSums) -> None:
        steps.append(step)
        self.answer = self.aggregator.report(self.attempt, step, 0, sums)

    def collect(self, step: int) -> Any:
        return self.answer

    def note(self, message: str) -> None:
        pass

    def close(self) -> None:
        pass


steps: list[int] = []


@pytest.fixture
def lone_worker(monkeypatch: pytest.MonkeyPatch, one_process_group: None) -> None:
    """A worker that is the only one, with a scheduler in its own process."""
    monkeypatch.setattr(context, "World", SimpleNamespace(current=World))
    monkeypatch.setattr(context, "SchedulerClient", LocalScheduler)
    monkeypatch.setattr(context, "watch_node", lambda world: None)
    steps.clear()


def worked(config: DistillConfig, attempt: int) -> Outcome | None:
    """Runs the only worker of an attempt in this process."""
    spec = prepare(config)
    aggregator = LossAggregator(TAIDSchedule(config.schedule, spec.total_steps), config.schedule.signal)
    with run_directory(config) as run:
        run.begin_attempt(1, "")
        return run_worker(
            WorkerSpec(config, spec, "cpu", aggregator, "", run.checkpoints, attempt, prepare_here(config))
        )


@pytest.mark.usefixtures("lone_worker")
def test_a_run_that_could_not_save_its_model_saves_it_later_without_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = build_config(config_for(TIED).model_dump() | {"out": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    refused = pytest.raises(
        RunError, match=r"could not be written to .*/model \(FileExistsError.*checkpoint is of step 4"
    )
    with refused, monkeypatch.context() as broken:
        broken.setattr("taid_ray.student.engine.save_model", lambda *_: (tmp_path / "run").mkdir())
        worked(config, 1)
    assert steps == [1, 2, 3, 4]
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert [path.name[:14] for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000004"]

    outcome = worked(config, 2)
    assert steps == [1, 2, 3, 4] and (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
    assert isinstance(outcome, Finished) and [found["step"] for found in outcome.summary["validations"]] == [0, 4]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == outcome.summary
    assert not list((tmp_path / "run" / "checkpoints").iterdir())  # a finished run has no use for it


@pytest.mark.usefixtures("lone_worker")
@pytest.mark.parametrize("model_too", [False, True])
def test_a_checkpoint_of_the_last_step_that_fails_keeps_no_model_from_being_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_too: bool
) -> None:

    def stuck(self: CheckpointWriter) -> None:
        if self._thread is not None:
            self._thread.join()
            raise CheckpointError("the storage has not taken the checkpoint")

    monkeypatch.setattr(CheckpointWriter, "wait", stuck)
    monkeypatch.setattr(CheckpointWriter, "_write_own", lambda *_: (tmp_path / "run").mkdir())
    config = build_config(config_for(TIED).model_dump() | {"out": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    if model_too:
        monkeypatch.setattr("taid_ray.student.engine.save_model", lambda *_: (tmp_path / "run").mkdir())
        with pytest.raises(
            RunError, match=r"FileExistsError.*There is no checkpoint yet.*trains again from the beginning$"
        ):
            worked(config, 1)
    else:
        assert isinstance(worked(config, 1), Finished) and (tmp_path / "run/model/model.safetensors").exists()


@pytest.mark.usefixtures("lone_worker")
def test_a_worker_trains_no_student_that_mixes_documents_in_its_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It passes the test on the CPU, before DeepSpeed, where kernels and dtype are others."""
    monkeypatch.setattr(engine, "hidden_states", lambda *given: hidden_states(*given).cumsum(1))
    config = build_config(config_for(TIED).model_dump() | {"out": str(tmp_path / "run")})
    with pytest.raises(ModelError, match=r"^student\.model: .* see each other .* data\.pack: false"):
        worked(config, 1)
    assert not steps


@pytest.mark.parametrize("field", ["attention_dropout", "resid_pdrop", "decoder_layerdrop", "router_jitter_noise"])
def test_rates_at_which_training_draws_random_numbers_are_known(field: str) -> None:
    class Config:
        def __init__(self, rate: float) -> None:
            self.to_dict = lambda: {field: rate, "initializer_range": 0.02, "dropout_is_on": True}
            self.get_text_config = lambda: self

    drawing, exact = (SimpleNamespace(config=Config(rate)) for rate in (0.1, 0.0))
    assert uses_dropout(drawing, config_for(TIED)) and not uses_dropout(exact, config_for(TIED))
