"""A run that is resumed on other data is refused before anything starts (fault 6)."""

import json
from pathlib import Path
from typing import Any

import pytest

from taid_ray.checkpoint.store import STATE_FILE, CheckpointStore, TrainingState, checkpoint_name
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.cursor import BlockCursor, Position
from taid_ray.driver import launch
from taid_ray.driver.preflight import prepare, with_data
from taid_ray.driver.same_data import check_same_data
from taid_ray.errors import ConfigError, DataError
from taid_ray.run.directory import RunManifest, inspect_run_dir, run_directory
from taid_ray.scheduler.aggregate import StepResult
from taid_ray.scheduler.schedule import ScheduleState
from tests.support.paths import BUNDLE
from tests.support.store import prepare_here


def stories(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps({"text": f"Tom has {n} dogs."}) + "\n" for n in range(count)))


def config_of(root: Path, **data: Any) -> DistillConfig:
    tree = {
        "teacher": {"model": str(BUNDLE / "stories260k"), "mode": "local"},
        "student": {"init": "cut", "layers": [0, 4], "dtype": "float32"},
        "data": {"train": str(root / "d.jsonl"), "valid_documents": 2, "sequence_length": 32, "order": "blocks"} | data,
        "train": {"steps": 2, "batch_size": 2},
        "out": str(root / "run"),
    }
    return build_config(tree)


def checkpoint(config: DistillConfig, step: int, data: Any, whole: bool = True) -> None:
    """What is left of a run that was stopped after `step`."""
    state = TrainingState(StepResult(step, ScheduleState(0.4)), BlockCursor(), {}, data)
    store, name = CheckpointStore(RunManifest(config).checkpoints), checkpoint_name(step, 1)
    files = {STATE_FILE: store.write(name, STATE_FILE, state.to_json(), [])}
    if whole:
        store.finish(name, 0, 1, files)


@pytest.fixture
def begun(tmp_path: Path) -> DistillConfig:
    stories(tmp_path / "d.jsonl", 20)
    config = config_of(tmp_path)
    with run_directory(config):
        return config


def test_other_data_are_refused_and_the_same_are_not(begun: DistillConfig, tmp_path: Path) -> None:
    found = prepare(begun).fingerprint
    assert found is not None
    assert check_same_data(begun, found) is None  # no checkpoint, so that it begins at step 1
    checkpoint(begun, 4, {"train": {"files": []}, "valid": None})
    checkpoint(begun, 6, found)
    checkpoint(begun, 8, {"train": {"files": []}, "valid": None}, whole=False)
    assert check_same_data(begun, found) is None
    (tmp_path / "d.jsonl").rename(tmp_path / "e.jsonl")
    moved = config_of(tmp_path, train=str(tmp_path / "e.jsonl"))
    assert check_same_data(moved, prepare(moved).fingerprint or {}) is None
    stories(tmp_path / "e.jsonl", 21)
    with pytest.raises(DataError) as refused:  # through the entry that a user has; no Ray is started
        launch.distill(moved)
    said = f"the data are not those that the run in {tmp_path / 'run'} was trained on up to step 6: data.train: "
    assert str(refused.value).startswith(
        said + "d.jsonl has changed (20 rows then, 21 rows now). Bring the old data back"
    )
    assert (tmp_path / "run/run.json").exists()


def test_a_checkpoint_of_before_resumes_with_a_note_from_the_same_path_only(
    begun: DistillConfig, tmp_path: Path
) -> None:
    found = prepare(begun).fingerprint or {}
    checkpoint(begun, 6, None)
    assert "data" not in json.loads((tmp_path / "run/checkpoints" / checkpoint_name(6, 1) / STATE_FILE).read_text())
    assert "step 6, of an older version of taid-ray, holds no fingerprint" in (check_same_data(begun, found) or "")
    moved = config_of(tmp_path, train=str(tmp_path / "e.jsonl"))
    with pytest.raises(DataError, match=r"data\.train \(was .*d\.jsonl.*holds no fingerprint.*Give the old path"):
        check_same_data(moved, found)


def test_a_run_of_before_the_global_order_goes_on_in_blocks_only(begun: DistillConfig, tmp_path: Path) -> None:
    checkpoint(begun, 6, prepare(begun).fingerprint)
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("  order: blocks\n", ""))  # as older versions wrote it
    now = config_of(tmp_path, order="global")
    with pytest.raises(
        ConfigError, match=r"data\.order \(was \"blocks\", now \"global\"\)\. Give them their old values"
    ):
        inspect_run_dir(now)
    with pytest.raises(ConfigError, match=r"step 6 .* was made with blocks; set data\.order=blocks to resume the run"):
        check_same_data(now, prepare(now).fingerprint or {})
    assert inspect_run_dir(begun) == "unfinished" and check_same_data(begun, prepare(begun).fingerprint or {}) is None


def test_prepared_data_that_have_changed_are_refused(tmp_path: Path) -> None:
    stories(tmp_path / "d.jsonl", 20)
    config = config_of(tmp_path, order="global", block_documents=8)  # which are read before Ray is started
    spec = prepare(config)
    with run_directory(config):
        begun = with_data(config, spec, prepare_here(config)).fingerprint
        state = TrainingState(StepResult(4, ScheduleState(0.4)), Position(8, 0, 9), {}, begun)
        store, name = CheckpointStore(RunManifest(config).checkpoints), checkpoint_name(4, 1)
        store.finish(name, 0, 1, {STATE_FILE: store.write(name, STATE_FILE, state.to_json(), [])})
    assert check_same_data(config, spec.fingerprint or {}) is None  # by sizes, before they are read
    assert check_same_data(config, begun or {}) is None
    lines = (tmp_path / "d.jsonl").read_text()
    (tmp_path / "d.jsonl").write_text(lines.replace("19 dogs", "19 cats"))  # of the same size
    changed = prepare(config)
    assert check_same_data(config, changed.fingerprint or {}) is None
    with pytest.raises(DataError, match=r"up to step 4: data\.train: d\.jsonl has changed\. Bring the old data back"):
        check_same_data(config, with_data(config, changed, prepare_here(config)).fingerprint or {})
    stories(tmp_path / "d.jsonl", 21)
    with pytest.raises(DataError, match=r"data\.train: d\.jsonl has changed \(.* bytes then, .* bytes now\)"):
        check_same_data(config, prepare(config).fingerprint or {})


def test_a_template_that_was_replaced_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"How many are {n}?", "response": f"{n} are {n}."} for n in range(9)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m.content }}>{{ eos_token }}{% endfor %}")
    config = config_of(tmp_path, format="prompt_response", chat_template=str(template))
    with run_directory(config):
        checkpoint(config, 4, prepare(config).fingerprint)
    assert check_same_data(config, prepare(config).fingerprint or {}) is None
    template.write_text(template.read_text().replace("<", "["))
    with pytest.raises(DataError, match="up to step 4: the documents are the same, but their tokens are not"):
        check_same_data(config, prepare(config).fingerprint or {})
