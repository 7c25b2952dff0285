import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taid_ray.report.search_notes import search_notes
from taid_ray.report.search_results import read_search
from taid_ray.report.statistics import compare_groups, trends
from tests.support.search_files import ALPHA, STEPS, Written, write_search

KEY = "schedule.alpha_steps"
BETA = {"schedule.beta": {"uniform": [0.5, 0.999]}}
MODE = {"schedule.mode": {"choice": ["adaptive", "linear"]}}


def said(
    directory: Path, trials: list[Written], word: str, space: dict[str, Any] = ALPHA, **settings: Any
) -> list[str]:
    """The notes that hold a word."""
    return [
        note for note in search_notes(read_search(write_search(directory, trials, space, **settings))) if word in note
    ]


def tried(values: list[Any], figures: list[float], key: str = KEY) -> list[Written]:
    return [Written(figure, {key: value}) for value, figure in zip(values, figures, strict=True)]


VALUES = [2.0, 18.0, 4.5, 1.1, 9.0, 6.0, 13.0, 3.0, 16.0, 7.5]


@pytest.mark.parametrize(("sign", "word"), [(1, "higher"), (-1, "lower")])
def test_a_steady_effect_is_seen_with_its_direction(sign: int, word: str, tmp_path: Path) -> None:
    (note,) = said(tmp_path, tried(VALUES, [5 + sign * value / 10 for value in VALUES]), "Spearman")
    assert note.startswith(f"Higher {KEY} went with {word} validation KL (Spearman rho {sign:+.2f}")
    assert "10 finished trials, p = 0.0" in note


def test_a_best_value_in_the_middle_is_seen(tmp_path: Path) -> None:
    """Spearman's rho alone would call this noise, although nothing matters more."""
    (note,) = said(tmp_path, tried(VALUES, [0.7 + abs(np.log(value / 5)) for value in VALUES]), "Spearman")
    assert note.startswith(f"The validation KL was lowest at middle values of {KEY}, around 5.25 (Spearman rho")


def test_a_worst_value_in_the_middle_is_seen(tmp_path: Path) -> None:
    (note,) = said(tmp_path, tried(VALUES, [9.7 - abs(np.log(value / 5)) for value in VALUES]), "Spearman")
    assert note.startswith(f"The validation KL was highest at middle values of {KEY} (")


def test_noise_is_called_noise(tmp_path: Path) -> None:
    figures = [1.3, 1.1, 1.2, 1.25, 1.35, 1.05, 1.4, 1.15, 1.22, 1.28]
    (note,) = said(tmp_path, tried([0.5 + value / 40 for value in VALUES], figures, "schedule.beta"), "Spearman", BETA)
    assert note.startswith("schedule.beta had no effect that could be seen: all within noise (Spearman rho ")


def test_noise_is_rarely_called_an_effect(tmp_path: Path) -> None:
    """One search in twenty at most, whatever the number of keys."""
    random = np.random.default_rng(1)
    space = {key: {"uniform": [0, 1]} for key in ("schedule.t_start", "schedule.beta", "loss.sft_weight")}
    search = read_search(write_search(tmp_path, [Written()] * 7, space))
    wrong = 0
    for _ in range(60):
        params = [{key: float(random.uniform()) for key in space} for _ in search.trials]
        trials = [
            replace(trial, params=found, validations=[{"kl": float(random.uniform(1, 2))}])
            for trial, found in zip(search.trials, params, strict=True)
        ]
        lines = [note for note in search_notes(replace(search, trials=trials)) if "Spearman" in note]
        assert len(lines) == 3
        wrong += any("no effect" not in line for line in lines)
    assert wrong <= 7  # 60 * 0.05 is 3; more than 7 of them has a chance of 1 in 100


def test_choices_are_compared_by_their_means(tmp_path: Path) -> None:
    values = ["linear", "adaptive"] * 5
    figures = [2.0 + (value == "adaptive") + number / 100 for number, value in enumerate(values)]
    (note,) = said(tmp_path / "a", tried(values, figures, "schedule.mode"), "schedule.mode", MODE)
    assert note.startswith(
        "schedule.mode made a difference (mean validation KL: linear 2.0400, adaptive 3.0500; 10 fin"
    )
    figures = [2.0 + (number % 4) / 10 for number in range(10)]
    (note,) = said(tmp_path / "b", tried(sorted(values), figures, "schedule.mode"), "schedule.mode", MODE)
    assert note.startswith("schedule.mode had no effect that could be seen: all within noise (mean validation KL")


def test_too_few_trials_are_not_called_noise(tmp_path: Path) -> None:
    assert said(tmp_path / "4", tried(VALUES[:4], [1, 2, 3, 4]), "Spearman") == []
    assert said(tmp_path / "4b", tried(VALUES[:4], [1, 2, 3, 4]), "at least 5 are needed")
    both = [
        Written(figure, {KEY: value, "schedule.beta": value / 20})
        for value, figure in zip(VALUES[:5], range(5), strict=True)
    ]
    for note in said(tmp_path / "5", both, "Spearman", ALPHA | BETA):
        assert "too few trials to show even the clearest effect" in note and "no effect" not in note
    trials = tried(["adaptive", "linear"] * 3, [1, 2, 1.1, 2.1, 1.2, 2.2], "schedule.mode")
    (note,) = said(tmp_path / "6", trials, "schedule.mode", MODE)
    assert "too few trials" in note  # the clearest case of 3 and 3 happens by chance once in ten times


def test_an_effect_needs_more_evidence_among_more_keys(tmp_path: Path) -> None:
    figures = [1.0, 1.8, 1.4, 1.2, 1.5, 1.1, 1.6, 1.3, 1.7, 1.9]
    alone = tried(VALUES, figures)
    assert "no effect" not in said(tmp_path / "a", alone, "Spearman")[0]
    space = ALPHA | {f"loss.{name}": {"uniform": [0, 1]} for name in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"}
    (note,) = said(tmp_path / "b", alone, "Spearman", space)
    assert "no effect" in note


def test_two_ways_to_be_right_need_twice_the_evidence(tmp_path: Path) -> None:
    """rho = 0.886 of six has p = 0.033, and a bend would have been told too."""
    (note,) = said(tmp_path, tried([1.0, 2, 4, 8, 12, 16], [2.0, 1, 3, 4, 6, 5]), "Spearman")
    assert "no effect" in note and "rho +0.89" in note and "p = 0.067" in note


def test_keys_that_did_not_vary_are_not_judged(tmp_path: Path) -> None:
    assert said(tmp_path / "a", tried([3.0] * 6, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]), "Spearman") == []
    assert said(tmp_path / "b", tried(VALUES[:6], [1.0] * 6), "Spearman") == []


def test_equal_figures_are_named(tmp_path: Path) -> None:
    (note,) = said(tmp_path / "a", tried(VALUES[:3], [1.000, 1.009, 1.004]), "within 1%")
    assert "All 3 finished trials" in note and "validation KL 1.0000 to 1.0090" in note
    assert said(tmp_path / "b", tried(VALUES[:3], [1.000, 1.02, 1.004]), "within 1%") == []
    assert said(tmp_path / "c", tried(VALUES[:1], [1.0]), "within 1%") == []


def adaptive(alpha_steps: float, **schedule: Any) -> Written:
    return Written(params={KEY: alpha_steps}, schedule={"t_start": 0.4, "alpha": alpha_steps / STEPS} | schedule)


def test_trials_whose_adaptive_part_did_nothing_are_counted(tmp_path: Path) -> None:
    """alpha N 0.6 / 2 <= 0.6, up to alpha N = 2; in mode normalised, sigmoid(10) in place of 1/2, up to 1.00005."""
    trials = [adaptive(1.9), adaptive(2.1), adaptive(1.9, mode="linear"), adaptive(1.01, mode="normalised")]
    (note,) = said(tmp_path / "a", [*trials, adaptive(1.0, mode="normalised")], "inactive")
    assert note.startswith(
        "Adaptive part inactive in 2 of 4 adaptive trials (0001, 0005): alpha * N * (1 - t_start) / 2"
    )
    assert said(tmp_path / "b", [adaptive(2.1), adaptive(1.9, mode="linear")], "inactive") == []


def test_other_losses_have_no_adaptive_part(tmp_path: Path) -> None:
    write_search(tmp_path, [adaptive(1.0)])
    config = tmp_path / "trials" / "0001" / "config.yaml"
    config.write_text(config.read_text().replace("name: taid", "name: reverse_kl"))
    assert "reverse_kl" in config.read_text()
    assert not any("inactive" in note for note in search_notes(read_search(tmp_path)))


def test_what_ended_early_is_named(tmp_path: Path) -> None:
    trials = [
        Written(0.5),
        Written(0.1, status="stopped", step=10),
        Written(status="failed", step=10, error="the loss is\n   nan"),
        Written(status="failed", step=10, error="the loss is nan"),
        Written(status="failed", step=10, error="x " * 500),
        Written(status="running"),
        Written(status="waiting"),
    ]
    found = search_notes(read_search(write_search(tmp_path, trials, scheduler="asha")))
    assert "The search is not complete: 2 trials (0006, 0007) to go." in found
    assert any(
        note.startswith("Stopped early by asha, so not compared at full length: 1 trial (0002).") for note in found
    )
    assert "2 trials (0003, 0004) failed: the loss is nan" in found
    assert any(note.startswith("1 trial (0005) failed: x x") and len(note) < 340 for note in found)
    assert not any("best.yaml" in note for note in found)


def test_no_finished_trial(tmp_path: Path) -> None:
    found = search_notes(read_search(write_search(tmp_path, [Written(status="stopped", step=10)])))
    assert any("no best one and no best.yaml" in note for note in found) and not any("seed" in note for note in found)


def test_one_seed_is_said(tmp_path: Path) -> None:
    assert said(tmp_path / "a", tried(VALUES[:2], [1, 2]), "train.seed")
    assert (
        said(tmp_path / "b", tried([1, 2], [1, 2], "train.seed"), "train.seed", {"train.seed": {"choice": [1, 2]}})
        == []
    )


@pytest.mark.parametrize(
    ("best", "space", "expected"),
    [
        (19.0, ALPHA, "19 lies at the upper end of what was searched (1 to 20)"),
        (1.1, ALPHA, "1.1 lies at the lower end"),
        (1.5, ALPHA, None),  # a tenth of the way in log
        (1.5, {KEY: {"uniform": [1, 20]}}, "1.5 lies at the lower end"),
        (16, {KEY: {"choice": [4, 16, 8]}}, "16 lies at the upper end of what was searched (4 to 16)"),
        (8, {KEY: {"choice": [4, 16, 8]}}, None),
        (16, {KEY: {"choice": [4, 16]}}, None),
        ("16", {KEY: {"choice": ["4", "16", "8"]}}, None),
    ],
)
def test_a_best_value_at_the_edge(best: Any, space: dict[str, Any], expected: str | None, tmp_path: Path) -> None:
    trials = [Written(0.5, {KEY: best}), *(Written(1.0 + number, {KEY: best}) for number in range(4))]
    found = said(tmp_path / "5", trials, "look beyond", space)
    assert [expected in note for note in found] == [True] if expected else found == []
    assert said(tmp_path / "4", trials[:4], "look beyond", space) == []


def test_spearman_is_that_of_the_textbook() -> None:
    """Hours of television a week and IQ, the example of Wikipedia: rho = -29/165, p = 0.627 by the t distribution."""
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    slope, _ = trends(iq, np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17.0]))
    assert slope.rho == pytest.approx(-29 / 165)
    assert slope.chance.p == pytest.approx(0.627, abs=0.02)


def test_p_counts_every_order_of_few() -> None:
    figures = np.array([1.0, 2.0, 3.0, 5.0, 4.0])
    assert trends([1, 1, 2, 3, 4], np.arange(5.0))[0].rho == pytest.approx(
        0.9747, abs=1e-4
    )  # equal values share a rank
    slope, _ = trends([1, 2, 3, 4, 5], figures)
    rhos = [abs(np.corrcoef(order, range(5))[0, 1]) for order in itertools.permutations(range(5))]
    assert slope.rho == pytest.approx(0.9)
    assert slope.chance.p == pytest.approx(np.mean([rho >= 0.9 - 1e-9 for rho in rhos]))
    assert slope.chance.least_p == pytest.approx(2 / 120)


def test_slope_and_bend_do_not_mix() -> None:
    line, arch = np.arange(9.0), -((np.arange(9.0) - 4) ** 2)
    slope, bend = trends(list(line), line)
    assert slope.rho == pytest.approx(1) and bend.rho == pytest.approx(0, abs=1e-9)
    slope, bend = trends(list(line), arch)
    assert slope.rho == pytest.approx(0, abs=1e-9) and bend.rho < -0.95 and bend.chance.p < 0.01
    slope, bend = trends([1, 1, 2, 2, 1, 2], np.array([1, 2, 4, 5, 3, 6.0]))
    assert slope.chance.p == pytest.approx(0.1) and bend.rho == 0 and bend.chance.p == 1


def test_groups() -> None:
    means, chance = compare_groups(["a", "a", "b", "b", "b"], np.array([1.0, 2.0, 3.0, 4.0, 8.0]))
    assert means == {"a": 1.5, "b": 5.0}
    assert chance.p == chance.least_p == pytest.approx(2 / 10)  # the two lowest or the two highest of five
    assert compare_groups(["a", "b"] * 6, np.arange(12.0))[1] == compare_groups(["a", "b"] * 6, np.arange(12.0))[1]
