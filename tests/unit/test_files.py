"""JSON files: whole or not at all, and damage is named."""

from pathlib import Path

import pytest

from taid_ray.errors import RunError
from taid_ray.files import TAIL, read_json, read_lines, replace_text, write_json, write_lines


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    write_json(path, {"steps": 2})
    assert read_json(path) == {"steps": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    (tmp_path / "summary.tmp").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"summary\.json cannot be written \(.*No space left.*make room"):
        replace_text(path, "{}")
    assert read_json(path) == {"steps": 1}


def test_lines_are_read_whole_also_the_last_ones_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == read_lines(path, 3) == []
    lines = [{"step": step, "text": "x" * 100} for step in range(2 * TAIL // 100)]
    write_lines(path, lines)
    with path.open("a") as file:
        file.write('{"step": 10')  # being written
    assert read_lines(path) == lines
    assert read_lines(path, 3) == lines[-3:]
    assert read_lines(path, 1) == lines[-1:]


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{\n")
    for read in (read_json, read_lines):
        with pytest.raises(RunError, match=r"x\.json is damaged.*not JSON"):
            read(path)
    assert read_json(tmp_path / "none.json") is None
