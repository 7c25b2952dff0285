"""`taid-ray simulate`: what it prints and draws, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from taid_ray.cli.app import app
from taid_ray.errors import ConfigError
from taid_ray.report import picture_file
from tests.support.paths import CURVES_FILE
from tests.support.report_files import STEPS, write_run

GOLDEN = json.loads(CURVES_FILE.read_text())["curves"]


def simulate(*options: Any) -> str:
    result = CliRunner().invoke(app, ["simulate", *map(str, options)], catch_exceptions=False, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written while the test runs."""
    found: list[Figure] = []
    write = Figure.savefig

    def written(figure: Figure, *args: Any, **kwargs: Any) -> None:
        found.append(figure)
        write(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", written)
    return found


def test_json_holds_the_seeds_numbers_and_nothing_is_drawn(tmp_path: Path) -> None:
    steps = GOLDEN[0]["step"]
    found = json.loads(simulate("--json", ",".join(map(str, steps))))
    assert not list(tmp_path.iterdir())
    assert all(list(entry) == ["alpha", "sigma", "step", "t", "closed_form"] for entry in found)
    wanted = [
        (golden["alpha"], golden["sigma"], step, t, closed)
        for golden in GOLDEN
        for step, t, closed in zip(steps, golden["t"], golden["closed_form_n_plus_1_updates"], strict=True)
    ]
    assert [tuple(entry.values()) for entry in found] == [pytest.approx(values, abs=1e-9) for values in wanted]


def test_the_table_fits_80_columns_and_says_where_the_floor_takes_over(tmp_path: Path) -> None:
    lines = simulate().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert ["0.001", "0.5", "11970", "t", "0.4513", "0.7770", "0.9503", "0.9889", "0.9999"] in rows
    assert ["closed", "form", "0.4513", "0.7770", "0.9503", "0.9889", "0.9975"] in rows
    assert ["0.005", "1", "never"] in [row[:3] for row in rows]
    assert ["floor", "0.0999", "0.2499", "0.4999", "0.7499", "0.9999"] in rows
    assert rows[-1] == ["picture:", "taid-t-curves.png"]
    assert matplotlib.image.imread(tmp_path / "taid-t-curves.png").ndim == 3


def test_the_picture_has_a_band_for_each_alpha_and_the_floor(figures: list[Figure]) -> None:
    simulate("--steps", 100, "--alpha", "0.1,0.02", "--sigma", "0.5,1,0.7", "--floor-from", 0, "--t-start", 0.2)
    (axes,) = figures[0].axes
    curves = {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}
    assert len(axes.collections) == 2 and len(curves) == 3 * 2 + 2
    assert curves["alpha 0.02, sigma 0.7"][0] == pytest.approx(0.2 + 0.02 * 0.7 * 0.8)
    assert curves["linear floor"] == pytest.approx([n / 100 for n in range(100)])
    assert len(curves["the floor takes over"]) == 3
    (path,) = axes.collections[1].get_paths()
    low, high = curves["alpha 0.02, sigma 0.5"], curves["alpha 0.02, sigma 1"]
    assert {round(float(y), 9) for y in path.vertices[:, 1]} == {round(y, 9) for y in [*low, *high]}


def test_a_runs_t_lies_over_curves_of_its_own_settings(tmp_path: Path, figures: list[Figure]) -> None:
    """Such a run in mode exponential follows the curve of sigma 1/2."""
    run = write_run(tmp_path / "run", schedule={"mode": "exponential", "t_start": 0.3, "t_end": 0.9, "alpha": 0.1})
    rows = [line.split() for line in simulate("--from", run, "--sigma", 0.5).splitlines()]
    real = next(row[4:] for row in rows if row[:4] == ["t", "of", "the", "run"])
    curve = next(row[4:] for row in rows if row[:2] == ["0.1", "0.5"])
    assert real[:-1] == curve[:-1] and real[-1] == "-"
    (axes,) = figures[0].axes
    curves = {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}
    assert curves["run run"] == pytest.approx(curves["alpha 0.1, sigma 0.5"][:-1], abs=1e-9)
    values = json.loads(simulate("--from", run, "--sigma", 0.5, "--t-start", 0.5, "--json", f"0,{STEPS - 1}"))
    assert [(value["alpha"], value["t"]) for value in values] == [(0.1, 0.5 + 0.5 * 0.1 * 0.5), (0.1, 0.9)]


def refused(*options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        simulate(*options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--alpha", "0"], ["--alpha", "above 0", "found 0"]),
        (["--alpha", "0.1,-1"], ["--alpha", "found -1"]),
        (["--alpha", "nan"], ["--alpha", "found nan"]),
        (["--alpha", ""], ["--alpha", "such as 0.5,1", "found ''"]),
        (["--sigma", "0.5;1"], ["--sigma", "commas", "0.5;1"]),
        (["--sigma", "1.5"], ["--sigma", "at most 1", "1.5"]),
        (["--t-start", "1.2"], ["--t-start", "within 0 and 1", "1.2"]),
        (["--t-start", "0.5", "--t-end", "0.4"], ["--t-start", "0.5", "above --t-end 0.4"]),
        (["--floor-from", "0.5", "--t-end", "0.4"], ["--floor-from", "0.5", "above --t-end 0.4"]),
        (["--floor-from", "nan"], ["--floor-from", "nan"]),
        (["--json", "12000"], ["--json", "0 to 11999", "found 12000"]),
        (["--json", "-1"], ["--json", "found -1"]),
        (["--json", "1.5"], ["--json", "whole numbers", "1.5"]),
        (["--out", "curves.svg"], ["--out", ".png", "curves.svg"]),
        (["--out", "absent/curves.png"], ["--out", "no directory absent"]),
        (["--from", "absent"], ["absent is not a run directory", "no such directory"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(options: list[str], found: list[str], tmp_path: Path) -> None:
    message = refused(*options)
    assert not [text for text in found if text not in message], message
    assert not list(tmp_path.iterdir())


def test_a_run_without_t_or_without_a_known_length_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "other", loss={"name": "forward_kl"})
    assert "loss.name is forward_kl, which has no t" in refused("--from", run)
    run = write_run(tmp_path / "epochs", finished=False, train={"epochs": 1})
    assert "--steps" in refused("--from", run)
    assert simulate("--from", run, "--steps", 50)


@pytest.mark.parametrize("steps", ["0", "-3", "2000000", "many"])
def test_impossible_steps_are_a_wrong_use(steps: str) -> None:
    result = CliRunner().invoke(app, ["simulate", "--steps", steps])
    assert result.exit_code == 2 and "--steps" in result.stderr


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(ConfigError, match=r"curves\.png cannot be written"):
        picture_file.write_picture(Figure(), tmp_path / "curves.png")
