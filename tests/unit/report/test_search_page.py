import base64
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from taid_ray.config.schema import load_config
from taid_ray.report.search_page import trials_table, write_report
from taid_ray.report.search_plots import BEST, Scale, key_scale, parallel, t_curves, validation
from taid_ray.report.search_results import Search, read_search
from tests.support.html_page import Page
from tests.support.search_files import ALPHA, Written, write_search

KEY = "schedule.alpha_steps"
SPACE = {
    KEY: {"loguniform": [1, 20]},
    "schedule.beta": {"uniform": [0.5, 0.999]},
    "schedule.t_start": {"uniform": [0, 0.6]},
    "train.learning_rate": {"loguniform": [1e-5, 1e-2]},
}
PARAMS = {
    KEY: 6.740719592736704,
    "schedule.beta": 0.61834,
    "schedule.t_start": 0.0245841,
    "train.learning_rate": 1.2345678e-05,
}
TRIALS = [
    Written(0.9, PARAMS | {KEY: 2.0}),
    Written(0.7, PARAMS, schedule={"alpha": 0.1685}),
    Written(0.5, PARAMS | {KEY: 9.0}, status="stopped", step=20),
    Written(3.5, PARAMS | {KEY: 19.0}, status="failed", step=10, error="<nan> & worse"),
    Written(2.5, PARAMS | {KEY: 3.0}, status="running", step=10),
    Written(params=PARAMS | {KEY: 4.0}, status="waiting"),
]


def made(directory: Path, trials: list[Written] = TRIALS, space: dict[str, Any] = SPACE, **settings: Any) -> Search:
    return read_search(write_search(directory / "s", trials, space, **settings))


def printed(search: Search, rows: int | None = None, width: int = 100) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(trials_table(search, rows))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_table_fits_a_terminal_and_says_all(tmp_path: Path) -> None:
    lines = printed(made(tmp_path))
    title = "Trials by validation KL: 2 finished, 1 running, 1 stopped, 1 failed, 1 waiting"
    assert lines[0].strip() == title
    heading = " ".join(lines[1].split()), " ".join(lines[2].split())
    assert heading == ("alpha_ learning_", "trial status step t loss val KL val CE steps beta t_start rate")
    rows = [line.split() for line in lines[3:]]
    assert " ".join(rows[0]) == "0002 finished 40/40 0.800 2.025 0.7000 2.2000 6.741 0.61834 0.02458 1.235e-05"
    assert [row[0] for row in rows] == ["0002", "0001", "0005", "0003", "0004", "0006"]
    assert rows[5][:7] == ["0006", "waiting", "-", "-", "-", "-", "-"]
    assert max(map(len, lines)) <= 100


def test_a_narrow_table_cuts_no_figure(tmp_path: Path) -> None:
    row = next(line for line in printed(made(tmp_path), width=80) if line.startswith("0002"))
    assert " ".join(row.split()).startswith("0002 finished 40/40 0.800 2.025 0.7000 2.2000 ")
    assert not any("…" in line for line in printed(made(tmp_path / "b"), width=80))


def test_a_short_table_keeps_what_runs(tmp_path: Path) -> None:
    lines = printed(made(tmp_path), rows=2)
    assert [line.split()[0] for line in lines[3:]] == ["0002", "0005", "and"]
    assert lines[-1].strip() == "and 4 more"


def test_keys_that_end_alike_are_named_in_full(tmp_path: Path) -> None:
    space = {"teacher.dtype": {"choice": ["float32"]}, "student.dtype": {"choice": ["float32"]}}
    heading = " ".join(printed(made(tmp_path, [], space), width=200))
    assert "teacher.dtype" in heading and "student.dtype" in heading


def test_values_are_not_taken_for_markup(tmp_path: Path) -> None:
    search = made(tmp_path, [Written(params={"data.subset": "[bold]a"})], {"data.subset": {"choice": ["[bold]a"]}})
    assert "[bold]a" in printed(search)[-1]


def lines_of(figure: Figure, axis: int = 0) -> dict[str, list[list[float]]]:
    """Data of the lines by colour."""
    found: dict[str, list[list[float]]] = {}
    for line in figure.axes[axis].get_lines():
        found.setdefault(str(line.get_color()), []).append([float(y) for y in line.get_ydata()])
    return found


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_parallel_draws_every_trial(tmp_path: Path) -> None:
    """Only finished ones reach the axis of the figure, where the best one is lowest."""
    search = made(tmp_path)
    figure = parallel(search)
    (best,) = lines_of(figure)[BEST]
    expected = [scale.height(PARAMS[key]) for key in SPACE for scale in [key_scale(search, key)]]
    assert best == pytest.approx([*expected, 0])
    lengths = [len(ys) for lines in lines_of(figure).values() for ys in lines if len(ys) > 2]
    assert sorted(lengths) == [4, 4, 4, 4, 5, 5]
    assert labels(figure)[:3] == ["0002  0.7000 (best)", "0001  0.9000", "0005  not ended"]
    names = [label.get_text().replace("\n", "") for label in figure.axes[0].get_xticklabels()]
    assert names == [*SPACE, "validationKL"]


def test_many_trials_are_named_by_kind(tmp_path: Path) -> None:
    trials = [Written(1 + number / 100, {KEY: 5.0}) for number in range(9)]
    search = made(tmp_path, [*trials, Written(2.0, {KEY: 5.0}, status="failed", step=10)], ALPHA)
    for draw in (parallel, t_curves, validation):
        assert labels(draw(search)) == ["0001  1.0000 (best)", "finished (dark: better)", "failed"]


def test_t_curves_show_t_by_step(tmp_path: Path) -> None:
    search = made(tmp_path)
    assert lines_of(t_curves(search))[BEST] == [[line["t"] for line in search.trials[1].metrics]]


def test_validation_shows_the_metric_and_the_ranks(tmp_path: Path) -> None:
    search = made(tmp_path, metric="cross_entropy")
    figure = validation(search)
    assert lines_of(figure)[BEST] == [[line["cross_entropy"] for line in search.trials[1].validations]]
    assert [1.5, 1.5] in lines_of(figure)["0.3"]  # the teacher
    ranks = figure.axes[1]
    assert [label.get_text() for label in ranks.get_yticklabels()] == ["0002", "0001"]
    assert [list(line.get_xdata()) for line in ranks.get_lines()] == [[2.2], [2.4]]
    assert "cross-entropy" in figure.axes[0].get_ylabel()


def test_scales() -> None:
    log = Scale("a", 1, 20, log=True)
    assert [label for _, label in log.ticks()] == ["1", "2", "5", "10", "20"]
    assert log.height(1) == 0 and log.height(20) == 1 and log.height(20**0.5) == pytest.approx(0.5)
    decades = [label for _, label in Scale("a", 1e-5, 10, log=True).ticks()]
    assert decades == ["1e-05", "0.0001", "0.001", "0.01", "0.1", "1", "10"]
    assert [label for _, label in Scale("a", 0.5, 0.999).ticks()] == ["0.5", "0.6", "0.7", "0.8", "0.9", "0.999"]
    assert Scale("a", 0.7, 0.7).ticks() == [(0.5, "0.7")] and Scale("a", 0.7, 0.7).height(0.7) == 0.5
    assert str(log.height(None)) == "nan"
    choices = Scale("a", choices=("false", "true"))
    assert choices.height(True) == 0.75 and choices.ticks() == [(0.25, "false"), (0.75, "true")]


def test_numbers_to_choose_from_are_drawn_in_order(tmp_path: Path) -> None:
    search = made(tmp_path, [], {"train.batch_size": {"choice": [32, 8, 128]}})
    assert key_scale(search, "train.batch_size").choices == ("8", "32", "128")


def test_long_choices_stay_apart(tmp_path: Path) -> None:
    names = [f"/models/of/the/whole/team/student-{letter}/weights" for letter in "ab"]
    scale = key_scale(made(tmp_path, [], {"student.model": {"choice": names}}), "student.model")
    assert [scale.height(name) for name in names] == [0.25, 0.75]


def test_report_is_one_page_with_everything_in_it(tmp_path: Path) -> None:
    search = made(tmp_path)
    for _ in range(2):  # a second time over the first
        write_report(search)
    text = (search.path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    pictures = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources]
    names = ("parallel.png", "t_curves.png", "validation.png")
    assert pictures == [(search.path / "report" / name).read_bytes() for name in names]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 10_000 for picture in pictures)
    assert "<script" not in text and "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert any("failed: <nan> & worse" in note for note in page.text["li"])
    assert page.text["td"][:3] == ["0002", "finished", "40/40"]
    assert "The best is 0002 with 0.7000: schedule.alpha_steps = 6.741" in page.text["p"][0]
    assert "color-scheme: light dark" in text
    assert (search.path / "best.yaml").read_text() in "".join(page.text["pre"])
    assert sorted(path.name for path in search.path.iterdir()) == [
        "best.yaml", "report", "report.html", "search.yaml", "trials", "trials.json"
    ]  # fmt: skip


def test_best_yaml_is_the_best_trials_run_under_a_name_of_its_own(tmp_path: Path) -> None:
    search = made(tmp_path)
    write_report(search)
    best = load_config(search.path / "best.yaml")
    trial = search.trials[1].config
    assert trial is not None and trial.out is not None
    assert best == trial.model_copy(update={"name": "stories-best", "out": None})
    assert best.schedule.alpha == 0.1685
    text = (search.path / "best.yaml").read_text()
    assert "trial 0002" in text and str(search.path) in text and "#   schedule.beta: 0.61834\n" in text


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [Written(status="waiting", params=PARAMS)],
        [Written(params=PARAMS, status="failed", step=0)],
        [Written(params=PARAMS)],
        [Written(float("nan"), params=PARAMS)],
        [Written(params=PARAMS), Written(params=PARAMS)],
        [Written(params={})],
        [Written(number, PARAMS) for number in range(30)],
    ],
    ids=["none", "waiting", "failed", "one", "nan", "equal", "without-params", "thirty"],
)
@pytest.mark.filterwarnings("error")
def test_any_search_has_a_report(trials: list[Written], tmp_path: Path) -> None:
    search = made(tmp_path, trials)
    write_report(search)
    Page((search.path / "report.html").read_text(encoding="utf-8"))
    assert (search.path / "best.yaml").exists() == (search.best() is not None)
    printed(search)


def test_odd_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Dollar signs would be formulas to matplotlib, and these ones errors."""
    space = {"data.prompt_columns": {"choice": [["$\\frac{a$", "b"], ["<c>"]]}, KEY: {"randint": [1, 2]}}
    search = made(tmp_path, [Written(params={"data.prompt_columns": ["<c>"], KEY: 1})], space)
    write_report(search)
    assert "&lt;c&gt;" in (search.path / "report.html").read_text()


def test_figures_do_not_pile_up(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    write_report(made(tmp_path))
    assert not plt.get_fignums()
