"""The driver of a search: what it settles without a cluster."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray import cloudpickle

from taid_ray.config.schema import build_config
from taid_ray.config.space import Space
from taid_ray.distributed import capacity
from taid_ray.distributed.capacity import Demand
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.signals import StopRequest
from taid_ray.errors import ClusterError
from taid_ray.report.search_results import read_search
from taid_ray.search import driver
from taid_ray.search.book import TrialBook
from taid_ray.search.callbacks import TrialsShown, Watcher
from taid_ray.search.driver import SearchDriver
from taid_ray.search.trial import SearchJob
from taid_ray.student.spec import RunSpec
from tests.support.harness import small_config
from tests.support.search_files import Written, write_search


def searching(directory: Path, key: str = "schedule.beta", **teacher: Any) -> SearchDriver:
    tree = small_config("searched")
    config = build_config(tree | {"teacher": tree["teacher"] | teacher, "out": str(directory)})
    space = Space.model_validate({"space": {key: {"uniform": [0.5, 0.9]}}})
    spec = cast(RunSpec, SimpleNamespace(total_steps=10))
    book, view = TrialBook(directory), ProgressView()
    return SearchDriver(config, space, spec, book, "s-1", None, TrialsShown(directory), view)


def test_trials_share_a_pool_unless_their_teachers_differ(tmp_path: Path) -> None:
    assert searching(tmp_path).pool == "taid-teacher-s-1"
    assert searching(tmp_path, mode="local", replicas=1).pool is None
    assert (
        searching(tmp_path, "teacher.temperature").pool is None
        and searching(tmp_path, "teacher.temperature").own_teachers
    )


def test_ray_tune_can_pickle_what_it_is_given(tmp_path: Path) -> None:
    """A thread, a lock or the terminal in it would end the search at its first trial."""
    search = searching(tmp_path)
    watcher = Watcher(search.book, StopRequest(), search.view)
    tuner = search._tuner(SearchJob(tmp_path, {}, 10, None, None, None, None, frozenset(), {}), 1, watcher)
    name = tuner._local_tuner._tune_config.trial_name_creator
    copy = pickle.loads(cloudpickle.dumps(name))
    assert copy(SimpleNamespace(config={"schedule.beta": 0.5})) == "0001"


def test_answers_and_images_of_all_trials_at_a_time_must_fit_the_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mib, demand = 2**20, cast(Demand, SimpleNamespace(workers=1))
    search = searching(tmp_path, window=2)
    spec = cast(RunSpec, SimpleNamespace(payload_bytes=mib, image_bytes=3 * mib))
    monkeypatch.setattr(driver, "room_for_trials", lambda *_: 2)
    monkeypatch.setattr(capacity, "_alive", lambda _: [{"object_store_memory": 32 * mib}])
    assert search._concurrent(demand, spec) == 2  # two windows of 2 x (1 + 3) MiB are half of it
    monkeypatch.setattr(capacity, "_alive", lambda _: [{"object_store_memory": 31 * mib}])
    with pytest.raises(ClusterError, match="images of up to 3 MiB for each of them, for each of 2 student worker"):
        search._concurrent(demand, spec)


def test_a_report_that_cannot_be_drawn_is_told_and_the_search_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, said = read_search(write_search(tmp_path / "S", [Written()])), list[str]()
    view = cast(ProgressView, SimpleNamespace(say=said.append))
    (search.path / "report").write_text("in the way")
    driver.leave_report(search, view)
    assert len(said) == 1 and said[0].startswith("warning: report.html could not be written (FileExistsError: ")
    assert (search.path / "best.yaml").exists()
    (search.path / "report").unlink()
    driver.leave_report(search, view)
    assert len(said) == 1 and (search.path / "report.html").exists()
