"""What a search remembers of its trials, whatever became of the driver before."""

import json
from pathlib import Path

import numpy as np
import pytest

from taid_ray.errors import RunError
from taid_ray.search.book import TrialBook


def test_names_count_up_and_equal_params_are_different_trials(tmp_path: Path) -> None:
    book = TrialBook(tmp_path)
    assert [book.assign_name({"a": value}) for value in (1, 2, 1)] == ["0001", "0002", "0003"]
    assert book.params() == [{"a": 1}, {"a": 2}, {"a": 1}]


def test_a_later_driver_finds_the_same_trials_whatever_the_order(tmp_path: Path) -> None:
    book = TrialBook(tmp_path)
    for value in (1, 2, 1):
        book.assign_name({"b": 0, "a": value})
    later = TrialBook(tmp_path)
    assert [later.assign_name({"a": value, "b": 0}) for value in (2, 1, 1, 1)] == ["0002", "0001", "0003", "0004"]


def test_numbers_of_numpy_are_kept_as_plain_ones(tmp_path: Path) -> None:
    TrialBook(tmp_path).assign_name({"a": np.float64(0.1), "b": np.int64(3)})
    assert TrialBook(tmp_path).assign_name({"a": 0.1, "b": 3}) == "0001"


def test_what_ran_waits_and_what_is_complete_is_finished(tmp_path: Path) -> None:
    book = TrialBook(tmp_path)
    for value, status in enumerate(("running", "running", "failed", "stopped", "finished")):
        book.mark(book.assign_name({"a": value}), status, "because")
    for name in ("0002", "0005"):  # a driver may be killed between a trial's end and its mark
        book.run_dir(name).mkdir(parents=True)
        (book.run_dir(name) / "summary.json").touch()
    assert [entry["status"] for entry in TrialBook(tmp_path).entries] == [
        "waiting", "finished", "waiting", "stopped", "finished"
    ]  # fmt: skip
    assert TrialBook(tmp_path).with_status("finished", "stopped") == ["0002", "0004", "0005"]


@pytest.mark.parametrize("content", ["", "[{]", json.dumps([{"params": {}}]), json.dumps({"a": 1})])
def test_a_damaged_book_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "trials.json").write_text(content)
    with pytest.raises(RunError, match=r"trials\.json is damaged"):
        TrialBook(tmp_path)
