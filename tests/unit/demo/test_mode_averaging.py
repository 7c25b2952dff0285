"""What each divergence must do to one Gaussian beside a mixture of three."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

from taid_ray.cli.app import app
from taid_ray.demo.mode_averaging import (
    GRID,
    MODES,
    PATH_STEPS,
    RATE,
    SPACING,
    START,
    Demonstration,
    Gaussian,
    demonstrate,
    kl,
    log_mixture,
    repeated,
    reverse_step,
    share_in_gaps,
    taid_step,
)

MEAN = sum(weight * mode.mean for weight, mode in MODES)
VARIANCE = sum(weight * (mode.deviation**2 + mode.mean**2) for weight, mode in MODES) - MEAN**2


@pytest.fixture(scope="module")
def found() -> Demonstration:
    return demonstrate()


def test_the_quadrature_is_exact() -> None:
    p = np.exp(log_mixture()) * SPACING
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p @ GRID == pytest.approx(MEAN, abs=1e-12)
    assert p @ (GRID - MEAN) ** 2 == pytest.approx(VARIANCE, abs=1e-11)
    wide, narrow = Gaussian(1.0, 2.0), Gaussian(0.0, 1.0)
    by_hand = np.log(1 / 2) + (4 + 1) / 2 - 1 / 2  # log(s2 / s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2
    assert kl(wide.log_density(), narrow.log_density()) == pytest.approx(by_hand, abs=1e-12)


def test_forward_kl_takes_mean_and_variance_of_the_mixture_and_fills_the_gaps(found: Demonstration) -> None:
    assert found.forward_kl.mean == pytest.approx(MEAN, abs=1e-9)
    assert found.forward_kl.deviation**2 == pytest.approx(VARIANCE, abs=1e-9)
    assert share_in_gaps(found.forward_kl.log_density()) > 0.1 > 50 * share_in_gaps(found.reverse_kl.log_density())


def test_reverse_kl_takes_the_mode_beside_which_it_starts(found: Demonstration) -> None:
    """There KL(q || p) is about the logarithm of how little of the mixture the mode is."""
    assert found.reverse_kl == repeated(reverse_step(log_mixture()), START)
    for weight, mode in MODES:
        fitted = repeated(reverse_step(log_mixture()), Gaussian(mode.mean + 0.3, 1.0))
        assert fitted.mean == pytest.approx(mode.mean, abs=0.1)
        assert fitted.deviation == pytest.approx(mode.deviation, rel=0.1)
        assert kl(fitted.log_density(), log_mixture()) == pytest.approx(-np.log(weight), abs=0.02)


def test_taid_goes_to_one_mode_first_and_ends_where_forward_kl_does(found: Demonstration) -> None:
    early, end = found.taid_at(0.25), found.taid_at(1.0)
    assert (found.t[0], found.t[-1], len(found.taid)) == (0.0, 1.0, PATH_STEPS + 1)
    assert early.mean == pytest.approx(found.reverse_kl.mean, abs=0.05)
    assert early.deviation == pytest.approx(found.reverse_kl.deviation, abs=0.05)
    assert end.mean == pytest.approx(MEAN, abs=0.001)  # behind by what t moves in 1 / RATE steps
    assert end.deviation == pytest.approx(VARIANCE**0.5, abs=0.001)
    target = log_mixture()
    forward = [kl(target, found.taid_at(t).log_density()) for t in (0.25, 0.5, 0.55, 0.75, 1.0)]
    reverse = [kl(found.taid_at(t).log_density(), target) for t in (0.25, 0.5, 0.55, 0.75, 1.0)]
    assert forward == sorted(forward, reverse=True) and reverse == sorted(reverse)


def test_taids_path_leaves_the_mode_at_once(found: Demonstration) -> None:
    """Between mode and mixture lies no Gaussian in which it could stay while t goes from 0.5 to 0.55."""
    deviations = [fitted.deviation for fitted in found.taid]
    way = VARIANCE**0.5 - found.reverse_kl.deviation
    jump = found.taid_at(0.55).deviation - found.taid_at(0.5).deviation
    assert jump > 0.85 * way
    assert max(deviations[PATH_STEPS // 10 : PATH_STEPS // 2]) < 1.1 < 4 < min(deviations[PATH_STEPS * 11 // 20 :])


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_taids_gradient_is_that_of_the_renyi_divergence_of_order_t(t: float) -> None:
    """Natural gradients: times the variance for the mean, and half for the logarithm of the standard deviation."""
    target, fitted, small = log_mixture(), Gaussian(-1.0, 2.0), 1e-5

    def divergence(mean: float, log_deviation: float) -> float:
        log_q = Gaussian(mean, np.exp(log_deviation)).log_density()
        return float(np.log(np.exp(t * target + (1 - t) * log_q).sum() * SPACING) / (t - 1))

    at = (fitted.mean, np.log(fitted.deviation))
    slopes = [
        (divergence(at[0] + a * small, at[1] + b * small) - divergence(at[0] - a * small, at[1] - b * small))
        / (2 * small)
        for a, b in ((1, 0), (0, 1))
    ]
    moved = taid_step(target, t)(fitted)
    assert (moved.mean - fitted.mean) / RATE == pytest.approx(-slopes[0] * fitted.deviation**2, rel=1e-6)
    assert np.log(moved.deviation / fitted.deviation) / RATE == pytest.approx(-slopes[1] / 2, rel=1e-6)


def test_the_command_prints_the_fits_and_draws_them(tmp_path: Path, found: Demonstration) -> None:
    picture = tmp_path / "fits.png"
    result = CliRunner().invoke(app, ["demo", "mode-averaging", "--out", str(picture)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[1][:4] == ["forward", "KL", f"{MEAN:.3f}", f"{VARIANCE**0.5:.3f}"]
    assert rows[2][:3] == ["reverse", "KL", f"{found.reverse_kl.mean:.3f}"]
    assert rows[-3][:5] == ["TAID,", "t", "=", "1", f"{found.taid[-1].mean:.3f}"]
    assert max(len(line) for line in result.stdout.splitlines()[:-1]) <= 80
    assert matplotlib.image.imread(picture).ndim == 3
