"""The report of a comparison: figures, verdicts and page, from files that nobody's run wrote."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from taid_ray.compare.page import notes, write_report
from taid_ray.compare.results import FIGURES, read_comparison
from taid_ray.compare.tables import cost, matrix, pairs, quality, sentence, shape, shown
from taid_ray.errors import ConfigError, RunError
from tests.support.comparison_files import write_comparison
from tests.support.search_files import Written, write_search

CROSS_ENTROPY = FIGURES[0]
METHODS = {"sft": [2.00, 2.02, 2.01], "taid": [1.80, 1.81, 1.82], "js": [1.805, 1.815, 1.81]}


def test_tables_have_the_mean_and_spread_of_every_method_the_best_one_first(tmp_path: Path) -> None:
    comparison = read_comparison(write_comparison(tmp_path / "C", METHODS, {"sft": 0.1, "taid": 0.3, "js": 0.2}))
    heading, *rows = quality(comparison)
    assert heading == ["method", "cross-entropy", "KL(p||q)", "KL(q||p)", "ROUGE-L", "ECE"]
    assert {row[0] for row in rows[:2]} == {"taid", "js"} and [row[0] for row in rows[2:]] == ["sft", "teacher"]
    taid = next(row for row in rows if row[0] == "taid")
    assert taid[1] == "1.8100 ±0.0100" and taid[4] == "0.3000 ±0.0000"
    assert rows[-1][:3] == ["teacher", "1.5000", "-"]
    assert ["taid", "100.0 ±0.0", "1.00 ±0.00", "101", "1.01"] in cost(comparison)
    assert shape(comparison)[-1] == ["teacher", "0.9100", "1.0e-07", "-", "-"]


def test_verdicts_tell_the_better_one_and_what_is_noise(tmp_path: Path) -> None:
    comparison = read_comparison(write_comparison(tmp_path / "C", METHODS))
    found = {frozenset(pair[:2]): pair for pair in pairs(comparison, CROSS_ENTROPY)}
    better, worse, verdict = found[frozenset(("taid", "sft"))]
    assert (better, worse) == ("taid", "sft") and verdict.difference == pytest.approx(-0.2)
    told = sentence(better, worse, verdict, CROSS_ENTROPY)
    assert told.startswith("taid is better than sft by 0.2000 (0.1") and not verdict.within_noise
    assert "within noise" in sentence(*found[frozenset(("taid", "js"))], CROSS_ENTROPY)
    heading, *rows = matrix(comparison, CROSS_ENTROPY)
    cells = {(row[0], name): cell for row in rows for name, cell in zip(heading, row, strict=True) if name}
    assert cells["taid", "sft"] == "+0.2000" and cells["sft", "taid"] == "-0.2000"
    assert cells["taid", "js"] == cells["js", "taid"] == "noise" and cells["taid", "taid"] == ""


def test_higher_rouge_is_better(tmp_path: Path) -> None:
    rouge = {"sft": 0.1, "taid": 0.3, "js": 0.2}
    comparison = read_comparison(write_comparison(tmp_path / "C", METHODS, rouge))
    figure = next(each for each in FIGURES if each.key == "rouge_l")
    assert {pair[:2] for pair in pairs(comparison, figure)} == {("taid", "js"), ("taid", "sft"), ("js", "sft")}


def test_the_page_stands_alone_and_the_figures_are_also_json(tmp_path: Path) -> None:
    comparison = read_comparison(write_comparison(tmp_path / "C", METHODS))
    write_report(comparison)
    page = (tmp_path / "C/comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and 'src="http' not in page and "<script" not in page
    assert "within noise of it" in page and "1.8100 ±0.0100" in page and "taid is better than sft" in page
    found = json.loads((tmp_path / "C/comparison.json").read_text())
    assert found["methods"]["sft"]["cross_entropy"] == [2.0, 2.02, 2.01]
    assert found["teacher_tokens"] == 9000 and len(found["verdicts"]) == 9


def test_what_failed_is_left_out_and_told(tmp_path: Path) -> None:
    comparison = read_comparison(write_comparison(tmp_path / "C", {"sft": [2.0, None], "taid": [1.8, 1.9]}))
    assert comparison.seeds("sft") == [0] and comparison.seeds("sft", "taid") == [0]
    assert notes(comparison)[0] == "sft with seed 1 has not finished (failed: out of memory); it is left out."
    write_report(comparison)
    assert (tmp_path / "C/comparison.html").exists()


def test_methods_without_a_seed_in_common_are_not_told_apart(tmp_path: Path) -> None:
    comparison = read_comparison(write_comparison(tmp_path / "C", {"sft": [2.0, None], "taid": [None, 1.0]}))
    assert comparison.verdict("taid", "sft", CROSS_ENTROPY).within_noise
    assert ["taid", "100.0", "-", "101", "1.01"] in cost(comparison)
    write_report(comparison)


def test_methods_that_did_not_begin_alike_are_told(tmp_path: Path) -> None:
    directory = write_comparison(tmp_path / "C", METHODS)
    assert read_comparison(directory).unequal_starts() == [0, 1, 2]  # the files of these runs begin elsewhere
    line = (directory / "trials/0001/validation.jsonl").read_text().splitlines()[0]
    for path in directory.glob("trials/*/validation.jsonl"):
        path.write_text("\n".join([line, *path.read_text().splitlines()[1:]]) + "\n")
    assert read_comparison(directory).unequal_starts() == []


def test_tables_fit_a_terminal(tmp_path: Path) -> None:
    comparison = read_comparison(write_comparison(tmp_path / "C", METHODS, {"sft": 0.1, "taid": 0.3, "js": 0.2}))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown("Quality", quality(comparison)))
    assert "1.8100 ±0.0100" in console.export_text()


def test_a_search_is_no_comparison(tmp_path: Path) -> None:
    write_search(tmp_path / "S", [Written(params={"schedule.alpha_steps": 3.0})])
    with pytest.raises(ConfigError, match="of no comparison"):
        read_comparison(tmp_path / "S")


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    directory = write_comparison(tmp_path / "C", METHODS)
    (directory / "trials/0002/evaluation.json").write_text("{}")
    with pytest.raises(RunError, match=r"0002/evaluation\.json is damaged"):
        read_comparison(directory)
