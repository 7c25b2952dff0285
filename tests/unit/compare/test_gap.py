"""Comparisons with several teachers: one student, what each teacher does for it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from taid_ray.compare.gap import Gap, notes, table, with_teachers
from taid_ray.compare.gap_page import write_gap_report
from taid_ray.compare.results import read_comparison
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.errors import ConfigError
from tests.support.comparison_files import write_comparison
from tests.support.search_files import BASE


def gap_of(directory: Path, by_teacher: dict[str, dict[str, list[float]]]) -> Gap:
    """Files of comparisons, by teacher and method the cross-entropy by seed. Each teacher is ten times as large."""
    found = {}
    for number, (name, methods) in enumerate(by_teacher.items()):
        path = write_comparison(directory / name, methods)
        for summary in path.glob("trials/*/summary.json"):
            content = json.loads(summary.read_text()) | {"teacher": {"parameters": 1000 * 10**number}}
            summary.write_text(json.dumps(content))
        found[name] = read_comparison(path)
    return Gap(directory, found)


def test_each_step_to_a_larger_teacher_is_judged(tmp_path: Path) -> None:
    small, middle, large = (
        {"taid": [value, value + 0.001, value - 0.001], "kl": [other, other + 0.001, other - 0.001]}
        for value, other in ((2.0, 1.9), (1.8, 1.7), (1.6, 1.8))
    )
    gap = gap_of(tmp_path, {"small": small, "middle": middle, "large": large})
    heading, teachers, *rows = table(gap)
    assert heading == ["", "small (1,000)", "middle (10,000)", "large (100,000)"] and teachers[1:] == ["1.5000"] * 3
    assert ["taid", "2.0000 ±0.0010", "1.8000 ±0.0010", "1.6000 ±0.0010"] in rows
    said = notes(gap)
    assert said[0].startswith("The teacher middle is NOT better than small: cross-entropy 1.5000 and 1.5000")
    assert any(each.startswith("kl: students of large are worse than of middle (+0.1000") for each in said)
    assert "taid: its students become better with every teacher." in said
    assert "kl: its students are best with middle, and not with the last teacher." in said
    write_gap_report(gap)
    page = (tmp_path / "gap.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "2.0000 ±0.0010" in page


def test_teachers_differ_in_nothing_but_the_model(tmp_path: Path) -> None:
    found = with_teachers(config(student={"model": "org/student"}), ["org/a", str(tmp_path / "b")])
    assert {name: each.given_teacher.model for name, each in found.items()} == {"org/a": "org/a", "b": f"{tmp_path}/b"}
    assert len({each.model_copy(update={"teacher": None}).model_dump_json() for each in found.values()}) == 1


@pytest.mark.parametrize(
    ("student", "teachers", "said"),
    [
        ({"init": "cut", "layers": [0]}, ["org/a"], "makes the student out of the teacher"),
        ({"init": "scratch"}, ["org/a"], "makes the student out of the teacher"),
        ({"model": "org/student"}, ["/x/a", "/y/a"], "two of them are called a"),
    ],
)
def test_a_student_that_changes_with_its_teacher_is_refused(
    student: dict[str, Any], teachers: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        with_teachers(config(student=student), teachers)


def config(student: dict[str, Any]) -> DistillConfig:
    return build_config(BASE | {"student": student})
