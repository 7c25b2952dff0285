import json
import math
from pathlib import Path
from typing import Any

import pytest

from taid_ray.config.distribution import Distribution
from taid_ray.errors import ConfigError, RunError
from taid_ray.report.format import shown
from taid_ray.report.search_results import bounds, position, read_search
from tests.support.search_files import STEPS, Written, write_search


def test_a_trial_is_read_from_its_run_directory(tmp_path: Path) -> None:
    params = {"schedule.alpha_steps": 3.5}
    search = read_search(write_search(tmp_path, [Written(0.75, params, schedule={"alpha": 0.0875})]))
    (trial,) = search.trials
    assert (trial.name, trial.params, trial.status, trial.error) == ("0001", params, "finished", "")
    assert trial.config is not None and trial.config.schedule.alpha == 0.0875
    assert [line["step"] for line in trial.metrics] == list(range(1, STEPS + 1))
    assert [line["step"] for line in trial.validations] == [0, 10, 20, 30, 40]
    assert (trial.step, trial.total_steps, trial.t) == (STEPS, STEPS, 0.8)
    assert (trial.figure("kl"), trial.figure("cross_entropy")) == (0.75, 2.25)
    assert trial.summary is not None and trial.summary["steps"] == STEPS
    assert (search.name, search.metric, search.path) == ("stories", "kl", tmp_path)
    assert search.space.space["schedule.alpha_steps"].kind == "loguniform"


def test_only_the_newest_lines(tmp_path: Path) -> None:
    """Also of a file longer than what is read of it."""
    write_search(tmp_path, [Written(0.75)])
    metrics = tmp_path / "trials" / "0001" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, "t": 0.5, "loss": 1.0}) + "\n" for step in range(1, 5001)))
    assert metrics.stat().st_size > 100_000
    (trial,) = read_search(tmp_path, last_lines=True).trials
    assert [line["step"] for line in trial.metrics] == [5000]
    assert [line["step"] for line in trial.validations] == [STEPS]


def test_a_waiting_trial_has_nothing_yet(tmp_path: Path) -> None:
    (trial,) = read_search(write_search(tmp_path, [Written(status="waiting")])).trials
    assert (trial.step, trial.t, trial.figure("kl"), trial.config, trial.total_steps) == (0, None, None, None, None)


def test_a_search_without_trials_yet(tmp_path: Path) -> None:
    write_search(tmp_path, [])
    (tmp_path / "trials.json").unlink()
    search = read_search(tmp_path)
    assert search.trials == [] and search.best() is None


@pytest.mark.parametrize("torn", [b'{"step": 41, "t"', b"{", b'{"step": 41}', b"\xff\xfe"])
@pytest.mark.parametrize("last_lines", [False, True])
def test_a_line_that_is_being_written_is_none(torn: bytes, last_lines: bool, tmp_path: Path) -> None:
    write_search(tmp_path, [Written(status="running")])
    for name in ("metrics.jsonl", "validation.jsonl"):
        with (tmp_path / "trials" / "0001" / name).open("ab") as file:
            file.write(torn)
    (trial,) = read_search(tmp_path, last_lines).trials
    assert trial.step == STEPS and trial.figure("kl") == 1.0


def test_a_configuration_is_read_again_when_it_changes(tmp_path: Path) -> None:
    write_search(tmp_path, [Written()])
    path = tmp_path / "trials" / "0001" / "config.yaml"
    assert read_search(tmp_path).trials[0].total_steps == STEPS
    (tmp_path / "trials" / "0001" / "summary.json").unlink()
    text = path.read_text()
    path.with_suffix(".tmp").write_text(text.replace(f"steps: {STEPS}", "steps: 99"))
    path.with_suffix(".tmp").replace(path)
    assert read_search(tmp_path).trials[0].total_steps == 99


def test_epochs_leave_the_length_open_until_the_end(tmp_path: Path) -> None:
    write_search(tmp_path, [Written()])
    run = tmp_path / "trials" / "0001"
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace(f"steps: {STEPS}", "steps: null").replace("epochs: null", "epochs: 2.0")
    )
    assert read_search(tmp_path).trials[0].total_steps == STEPS
    (run / "summary.json").unlink()
    assert read_search(tmp_path).trials[0].total_steps is None


def names(trials: list[Any]) -> str:
    return " ".join(trial.name for trial in trials)


def test_rank(tmp_path: Path) -> None:
    """Finished trials by figure; others never above them, however good they look."""
    trials = [
        Written(0.9),
        Written(0.1, status="failed", step=30),
        Written(0.2, status="stopped", step=10),
        Written(0.7),
        Written(0.4, status="stopped", step=20),
        Written(0.3, status="stopped", step=20),
        Written(status="waiting"),
        Written(0.1, status="running", step=20),
        Written(0.7),
    ]
    search = read_search(write_search(tmp_path, trials))
    assert names(search.ranked()) == "0004 0009 0001 0008 0006 0005 0003 0002 0007"
    assert names(search.finished()) == "0004 0009 0001"
    assert search.best() is not None and search.best().name == "0004"


def test_the_metric_decides(tmp_path: Path) -> None:
    write_search(tmp_path, [Written(0.5), Written(0.9)], metric="cross_entropy")
    lines = tmp_path / "trials" / "0001" / "validation.jsonl"
    lines.write_text(lines.read_text().replace('"cross_entropy": 2.0', '"cross_entropy": 7.0'))
    assert names(read_search(tmp_path).ranked()) == "0002 0001"


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_never_best(figure: float, tmp_path: Path) -> None:
    search = read_search(write_search(tmp_path, [Written(figure), Written(5.0)]))
    assert names(search.ranked()) == "0002 0001" and names(search.finished()) == "0002"
    only = read_search(write_search(tmp_path / "only", [Written(figure)]))
    assert only.best() is None


def test_stopped_trials_are_never_best(tmp_path: Path) -> None:
    assert read_search(write_search(tmp_path, [Written(0.1, status="stopped")])).best() is None


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no search\.yaml.*--out"):
        read_search(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("search.yaml", "space: {space: {}}", "does not hold config and space"),
        ("search.yaml", "config: {name: a}\nspace: {space: {}}", "does not hold config and space"),
        ("search.yaml", "config: [a]\nspace: 3", "does not hold config and space"),
        ("trials.json", '[{"name": "0001"', "not JSON"),
        ("trials.json", '{"0001": {}}', "no list"),
        ("trials.json", '[{"name": "0001", "params": {}}]', "entry 1"),
        ("trials.json", '[{"name": "0001", "params": {}, "status": "lost"}]', "unknown status 'lost'"),
        ("trials/0001/summary.json", "{", "not JSON"),
        ("trials/0001/metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "a line of it is not JSON"),
        ("trials/0001/config.yaml", "train: {steps: 0}", r"train\.steps"),
    ],
)
def test_a_damaged_file_is_named(name: str, text: str, said: str, tmp_path: Path) -> None:
    write_search(tmp_path, [Written()])
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=said) as error:
        read_search(tmp_path)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.6346235701681713, "0.6346"), (0.99999, "0.99999"), (8.0, "8"), (0.0, "0"), (1.234567e-05, "1.235e-05"),
        (1e-4, "0.0001"), (16, "16"), (True, "true"), (None, "null"), ("linear", "linear"), ([0.9, 0.999], "[0.9, 0.999]"),
        ("/models/of/the/team/student-b", "/models/o...am/student-b"),
    ],
)  # fmt: skip
def test_shown(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ({"loguniform": [1, 20]}, (1, 20)),
        ({"quniform": [0, 1, 0.25]}, (0, 1)),
        ({"randint": [2, 9]}, (2, 8)),
        ({"choice": [32, 8, 16]}, (8, 32)),
        ({"choice": ["adaptive", "linear"]}, (0, 0)),
        ({"choice": [0.1, None]}, (0, 0)),
        ({"choice": [True, False]}, (0, 0)),
    ],
)
def test_bounds(distribution: dict[str, Any], expected: tuple[float, float]) -> None:
    assert bounds(Distribution.model_validate(distribution)) == expected


def test_position() -> None:
    assert position(0.3, 0.2, 0.6, log=False) == pytest.approx(0.25)
    assert position(10, 1, 1000, log=True) == pytest.approx(1 / 3)
