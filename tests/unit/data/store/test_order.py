"""The order of rows: permutations, drawn as if at random, and mixtures whose proportions are exact."""

from collections import Counter
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_ray.data.store.order import GlobalOrder, MixedOrder, permuted, uses_by_weight

TIMES_SIGMA = 5
"""Standard deviations by which a statistic may differ from what chance gives. All draws are the same in every run."""


def excess(observed: np.ndarray, expected: np.ndarray | float, degrees: int) -> float:
    """How far chi-square is from its mean, in standard deviations."""
    return float((((observed - expected) ** 2 / expected).sum() - degrees) / sqrt(2 * degrees))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.text(max_size=9))
def test_every_index_comes_once(count: int, key: str) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(count), count, key)), np.arange(count))


@pytest.mark.parametrize("count", [2**16 - 1, 2**16, 2**16 + 1, 4**9 + 1])
def test_every_index_comes_once_at_sizes_where_the_network_changes(count: int) -> None:
    """grain 0.2.18 loses the last one of 4^k + 1."""
    assert np.array_equal(np.sort(permuted(np.arange(count), count, "0/0")), np.arange(count))


@pytest.mark.parametrize("count", [10**9, 2**40 + 7, 2**60])
def test_indices_of_huge_permutations_are_in_range_and_differ(count: int) -> None:
    found = permuted(np.arange(count - 20_000, count), count, "0/0")
    assert found.min() >= 0 and found.max() < count and np.unique(found).size == 20_000
    assert excess(np.histogram(found, 50, (0, count))[0], 400.0, 49) < TIMES_SIGMA


def test_the_permutation_never_changes() -> None:
    """Runs that are resumed rely on it."""
    assert permuted(np.arange(10), 10, "7/0").tolist() == FIXED_10
    assert permuted(np.arange(5), 10**12, "7/0").tolist() == FIXED_10_12


FIXED_10 = [5, 7, 9, 0, 6, 4, 8, 3, 1, 2]
FIXED_10_12 = [532525813436, 602498935383, 895836448195, 3400699561, 81381582107]


@pytest.mark.parametrize("count", [2, 3, 5, 7, 10, 64])
def test_a_row_is_as_likely_at_one_position_as_at_another(count: int) -> None:
    epochs = 40 * count
    order, seen = GlobalOrder(count, seed=3), np.zeros((count, count))
    np.add.at(seen, (np.tile(np.arange(count), epochs), order.rows_at(0, epochs * count)), 1)
    assert seen.sum() == epochs * count
    assert excess(seen, 40.0, (count - 1) ** 2) < TIMES_SIGMA


@pytest.mark.parametrize("count", [3_000, 65_537, 100_000])
def test_data_sorted_by_source_do_not_stay_sorted(count: int) -> None:
    """Ten sources, one after the other; each hundredth of an epoch has about a tenth of each."""
    rows = GlobalOrder(count, seed=1).rows_at(0, count)
    parts, sources = np.arange(count) * 100 // count, rows * 10 // count
    seen = np.zeros((100, 10))
    np.add.at(seen, (parts, sources), 1)
    expected = seen.sum(1, keepdims=True) * seen.sum(0, keepdims=True) / count
    assert abs(excess(seen, expected, 99 * 9)) < TIMES_SIGMA


@pytest.mark.parametrize("count", [3_000, 65_537, 100_000])
def test_ranks_are_not_correlated(count: int) -> None:
    """Position with row, a row with the next one, and the same position in two epochs (Spearman's rho, as ranks they are)."""
    first, second = (GlobalOrder(count, seed=1).rows_at(epoch * count, (epoch + 1) * count) for epoch in (0, 1))
    other_seed = GlobalOrder(count, seed=2).rows_at(0, count)
    pairs = [(np.arange(count), first), (first[1:], first[:-1]), (first, second), (first, other_seed)]
    assert all(abs(np.corrcoef(*pair)[0, 1]) < TIMES_SIGMA / sqrt(count) for pair in pairs)
    assert np.count_nonzero(np.diff(first) == 1) < 10  # one on average


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(0, 9), st.integers(0, 300), st.integers(0, 300))
def test_any_range_of_positions_stands_alone(rows: int, seed: int, start: int, length: int) -> None:
    order = GlobalOrder(rows, seed)
    assert np.array_equal(order.rows_at(0, start + length)[start:], order.rows_at(start, start + length))


mixtures = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(mixtures, st.integers(0, 9), st.integers(0, 4))
def test_a_mixture_is_exact_in_every_epoch(sizes: list[tuple[int, int]], seed: int, epoch: int) -> None:
    order = MixedOrder(*zip(*sizes, strict=True), seed=seed)
    uses = Counter(order.sources_of(order.rows_at(epoch * order.epoch_rows, (epoch + 1) * order.epoch_rows)).tolist())
    assert uses == {source: wanted for source, (_, wanted) in enumerate(sizes)}


@settings(deadline=None, max_examples=60)
@given(mixtures, st.integers(0, 9))
def test_rows_of_a_source_are_used_equally_often(sizes: list[tuple[int, int]], seed: int) -> None:
    """At the end of any epoch, and in a source alone: floor and ceiling of uses / rows."""
    order = MixedOrder(*zip(*sizes, strict=True), seed=seed)
    for epochs in (1, 2, 5):
        counts = np.bincount(order.rows_at(0, epochs * order.epoch_rows), minlength=sum(order.rows))
        edges = np.cumsum([0, *order.rows])
        for start, stop, rows, uses in zip(edges[:-1], edges[1:], order.rows, order.uses, strict=True):
            assert {*counts[start:stop].tolist()} <= {epochs * uses // rows, -(-epochs * uses // rows)}


@settings(deadline=None, max_examples=60)
@given(mixtures, st.integers(0, 9), st.integers(0, 90), st.integers(0, 90))
def test_any_range_of_a_mixture_stands_alone(sizes: list[tuple[int, int]], seed: int, start: int, length: int) -> None:
    order = MixedOrder(*zip(*sizes, strict=True), seed=seed)
    assert np.array_equal(order.rows_at(0, start + length)[start:], order.rows_at(start, start + length))


def test_sources_are_mixed_everywhere() -> None:
    order = MixedOrder((5000, 100, 3000), (4000, 4000, 2000), seed=0)
    seen = np.zeros((50, 3))
    np.add.at(seen, (np.arange(10_000) // 200, order.sources_of(order.rows_at(0, 10_000))), 1)
    assert abs(excess(seen, np.array([80.0, 80.0, 40.0]), 49 * 2)) < TIMES_SIGMA


def test_uses_by_weight() -> None:
    assert uses_by_weight([1, 1], 10) == (5, 5)
    assert uses_by_weight([2, 1, 1], 10) == (5, 3, 2)
    assert uses_by_weight([0.7, 0.2, 0.1], 1000) == (700, 200, 100)


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=9), st.integers(0, 10**9))
def test_uses_by_weight_add_up_and_differ_by_less_than_one(weights: list[float], total: int) -> None:
    uses = uses_by_weight(weights, total)
    assert sum(uses) == total
    assert all(abs(n - total * w / sum(weights)) < 1 + 1e-6 for n, w in zip(uses, weights, strict=True))
