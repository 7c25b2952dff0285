"""What a search settles before it touches a cluster."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.config.space import Space
from taid_ray.errors import ConfigError, TeacherError
from taid_ray.search.directory import base_config, search_directory
from tests.support.harness import small_config


def config(out: Path, share_outputs: bool = True, **changes: Any) -> DistillConfig:
    return base_config(build_config(small_config("searched", **changes)), out, share_outputs)


def space(**values: Any) -> Space:
    return Space.model_validate({"space": {"schedule.beta": {"uniform": [0.5, 0.9]}}} | values)


def begin(out: Path, trials: int = 1) -> None:
    with search_directory(config(out), space()) as (book, _):
        for value in range(trials):
            book.assign_name({"schedule.beta": value})


def test_trials_share_a_cache_in_the_searchs_directory_unless_told_otherwise(tmp_path: Path) -> None:
    assert config(tmp_path / "S").cache.directory == str(tmp_path / "S/cache")
    own = build_config(small_config("searched") | {"cache": {"directory": str(tmp_path / "own")}})
    assert base_config(own, tmp_path / "S", True).cache.directory == str(tmp_path / "own")
    assert not base_config(own, tmp_path / "S", False).cache.on
    without_teacher = own.model_copy(update={"teacher": own.teacher.model_copy(update={"mode": "cache"})})
    assert base_config(without_teacher, tmp_path / "S", False).cache.on


def test_trials_share_the_day_on_which_the_search_began(tmp_path: Path) -> None:
    assert config(tmp_path / "S").data.date == date.today().isoformat()
    with search_directory(config(tmp_path / "S", data={"date": "2026-01-02"}), space()):
        pass
    assert config(tmp_path / "S").data.date == "2026-01-02"


def test_elastic_trials_use_the_fewest_workers(tmp_path: Path) -> None:
    workers = config(tmp_path / "S", student={"workers": {"min": 1, "max": 4}}).student.workers
    assert (workers.min, workers.max) == (1, 1)


def test_a_search_is_taken_up_with_its_name_and_may_grow(tmp_path: Path) -> None:
    begin(tmp_path / "S", 2)
    with search_directory(config(tmp_path / "S"), space()) as (_, first):
        pass
    with search_directory(config(tmp_path / "S"), space(trials=30)) as (book, second):
        assert len(book.entries) == 2 and first == second


def test_a_search_that_was_begun_when_the_cache_had_memory_is_taken_up(tmp_path: Path) -> None:
    begin(tmp_path / "S", 2)
    path = tmp_path / "S/search.yaml"
    content = yaml.safe_load(path.read_text())
    content["config"]["cache"]["memory_gib"] = 8.0
    path.write_text(yaml.safe_dump(content))
    with search_directory(config(tmp_path / "S"), space()) as (book, _):
        assert len(book.entries) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"changes": {"train": {"batch_size": 8}}}, r"train\.batch_size \(was 16, now 8\)"),
        ({"space": {"seed": 3}}, r"seed \(was 0, now 3\)"),
        ({"space": {"trials": 1}}, r"trials: 1 is fewer than the 2"),
    ],
)
def test_another_search_in_the_same_directory_is_refused(tmp_path: Path, changed: Any, message: str) -> None:
    begin(tmp_path / "S", 2)
    other = config(tmp_path / "S", **changed.get("changes", {}))
    with pytest.raises(ConfigError, match=message), search_directory(other, space(**changed.get("space", {}))):
        pass


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ConfigError, match="holds other files"), search_directory(config(tmp_path), space()):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("trials", [0, 1])
def test_a_search_that_fails_before_its_first_trial_leaves_nothing(tmp_path: Path, trials: int) -> None:
    with pytest.raises(TeacherError), search_directory(config(tmp_path / "S"), space()) as (book, _):
        for value in range(trials):
            book.assign_name({"schedule.beta": value})
        raise TeacherError("gone")
    assert (tmp_path / "S").exists() == bool(trials)


def test_a_search_of_before_is_never_removed(tmp_path: Path) -> None:
    begin(tmp_path / "S")
    (tmp_path / "S/trials.json").unlink()
    with pytest.raises(KeyboardInterrupt), search_directory(config(tmp_path / "S"), space()):
        raise KeyboardInterrupt
    assert (tmp_path / "S/search.yaml").exists()


def test_two_drivers_cannot_have_one_search(tmp_path: Path) -> None:
    begin(tmp_path / "S")
    with (
        search_directory(config(tmp_path / "S"), space()),
        pytest.raises(ConfigError, match="another process is at work"),
        search_directory(config(tmp_path / "S"), space()),
    ):
        pass
