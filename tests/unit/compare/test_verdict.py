"""Verdicts on pairs of methods: right as often as they say, by the noise of documents and of seeds."""

import math

import numpy as np
import pytest

from taid_ray.compare import verdict
from taid_ray.compare.verdict import Verdict, judge

SEEDS, DOCUMENTS = 3, 40


def figures(
    numbers: np.random.Generator, difference: float, of_seeds: float, of_documents: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two methods on the same documents: what is hard about a document is common to both."""
    hardness = numbers.normal(3, 1, DOCUMENTS)
    both = [
        hardness + numbers.normal(0, of_seeds, (SEEDS, 1)) + numbers.normal(0, of_documents, (SEEDS, DOCUMENTS))
        for _ in range(2)
    ]
    return both[0] + difference, both[1]


@pytest.mark.parametrize(("of_seeds", "of_documents"), [(0.05, 0.0), (0.05, 0.1), (0.0, 0.2)])
def test_methods_that_do_not_differ_are_seldom_told_apart(
    of_seeds: float, of_documents: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "DRAWS", 800)
    numbers = np.random.default_rng(7)
    tries = [judge(*figures(numbers, 0.0, of_seeds, of_documents), np.ones(DOCUMENTS)) for _ in range(150)]
    assert sum(not found.within_noise for found in tries) <= 0.09 * len(tries)


def test_a_difference_well_above_the_noise_is_seen_and_not_a_smaller_one() -> None:
    numbers = np.random.default_rng(8)
    clear = judge(*figures(numbers, 0.5, 0.05, 0.1), np.ones(DOCUMENTS))
    assert not clear.within_noise and clear.low > 0 and clear.difference == pytest.approx(0.5, abs=0.1)
    assert judge(*figures(numbers, 0.01, 0.05, 0.1), np.ones(DOCUMENTS)).within_noise


def test_documents_count_by_their_weights() -> None:
    first, second = np.array([[1.0, 5.0]]), np.array([[0.0, 1.0]])
    assert judge(first, second, np.array([3.0, 1.0])).difference == pytest.approx((3 * 1 + 1 * 4) / 4)


def test_exchanging_the_methods_turns_the_sign_and_equal_ones_are_within_noise() -> None:
    first, second = figures(np.random.default_rng(9), 0.1, 0.02, 0.1)
    there, back = judge(first, second, np.ones(DOCUMENTS)), judge(second, first, np.ones(DOCUMENTS))
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert judge(first, first, np.ones(DOCUMENTS)) == Verdict(0.0, 0.0, 0.0)
    assert judge(first, first, np.ones(DOCUMENTS)).within_noise


def test_one_seed_is_judged_by_documents_and_infinite_figures_by_nothing() -> None:
    first, second = np.full((1, DOCUMENTS), 2.0), np.full((1, DOCUMENTS), 1.0)
    assert not judge(first, second, np.ones(DOCUMENTS)).within_noise
    found = judge(first, np.full((1, DOCUMENTS), math.inf), np.ones(DOCUMENTS))
    assert found.within_noise and math.isnan(found.difference)
