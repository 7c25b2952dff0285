"""The order of training rows: a permutation of all rows in every epoch, and of several sources in exact proportions.

A permutation is computed for any range of positions alone, so nothing is kept and nothing is read to find row 10^9. It is a
Feistel network over pairs of numbers (a * b >= rows), whose few surplus values are mapped once more until they fall among
the rows ("cycle walking"; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

grain's `index_shuffle` follows the same idea, but in grain 0.2.18 it is no permutation of 4^k + 1 rows (of 65,537 the last
one never comes), takes 45 us a call at 1,000 rows and 7 ms at two, and one call gives one index; here it is 0.02 us each.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from taid_ray.data.batch import Ints

ROUNDS = 6
_ODD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # multipliers of splitmix64
_HALF = np.uint64(32)


def permuted(indices: Ints, count: int, key: str) -> Ints:
    """Maps indices below `count` by the permutation of range(count) that `key` names, the same on every machine."""
    keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), dtype="<u8")[:ROUNDS]
    width = math.isqrt(count - 1) + 1
    height = -(-count // width)
    result = _network(indices.astype(np.uint64), width, height, keys)
    while (outside := np.flatnonzero(result >= np.uint64(count))).size:
        result[outside] = _network(result[outside], width, height, keys)
    return result.astype(np.int64)


def _network(values: NDArray[np.uint64], width: int, height: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permutes the numbers below width * height, each at most 2^32. Either half in turn is moved on by a hash of the other."""
    sizes = [np.uint64(height), np.uint64(width)]
    halves = list(np.divmod(values, sizes[1]))
    moved, spare = np.empty_like(values), np.empty_like(values)  # a batch's positions stay in the processor's cache
    for number, key in enumerate(keys):
        own, other = number % 2, 1 - number % 2
        np.add(halves[other], key, out=moved)
        moved *= _ODD[0]
        moved ^= np.right_shift(moved, _HALF, out=spare)
        moved *= _ODD[1]
        moved >>= _HALF
        moved *= sizes[own]
        moved >>= _HALF  # below the half's size
        moved += halves[own]
        np.subtract(moved, sizes[own], out=spare)
        np.minimum(moved, spare, out=halves[own])  # modulo the size, because a number below 0 wraps to a huge one
    return halves[0] * sizes[1] + halves[1]


def _in_epochs(positions: Ints, size: int, key: str) -> Ints:
    """Maps endless positions to places below `size`, every epoch of `size` positions by a permutation of its own."""
    if not positions.size:
        return positions
    epochs = positions // size
    result = np.empty_like(positions)
    for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
        chosen = epochs == epoch
        result[chosen] = permuted(positions[chosen] - epoch * size, size, f"{key}/{epoch}")
    return result


class Order(Protocol):
    """The interface of an endless order of rows."""

    @property
    def epoch_rows(self) -> int:
        """Number of positions in an epoch."""

    def rows_at(self, start: int, stop: int) -> Ints:
        """Returns the numbers of the rows at positions start to stop - 1, counted from the beginning of epoch 0."""


@dataclass(frozen=True)
class GlobalOrder:
    """Order in which every epoch is a permutation of all rows, by nothing but (seed, epoch)."""

    epoch_rows: int
    """Number of rows, and so of positions in an epoch."""
    seed: int

    def rows_at(self, start: int, stop: int) -> Ints:
        """Returns the numbers of the rows at positions start to stop - 1, counted from the beginning of epoch 0."""
        return _in_epochs(np.arange(start, stop), self.epoch_rows, f"{self.seed}/rows")


@dataclass(frozen=True)
class MixedOrder:
    """Order over several sources whose rows are numbered one source after the other, by nothing but (seed, epoch).

    Every epoch has exactly uses[i] rows of source i, anywhere among the others. A source's rows come in permutations of
    their own that go on from epoch to epoch, so that all of them are used before one is used again.
    """

    rows: tuple[int, ...]
    """Number of rows of each source."""
    uses: tuple[int, ...]
    """Number of rows of each source in an epoch; may be more than it has."""
    seed: int

    @property
    def epoch_rows(self) -> int:
        """Number of positions in an epoch."""
        return sum(self.uses)

    def rows_at(self, start: int, stop: int) -> Ints:
        """Returns the numbers of the rows at positions start to stop - 1, counted from the beginning of epoch 0.

        An epoch has a slot for each use of a source's row, one source after the other. Positions are permuted among them.
        """
        positions = np.arange(start, stop)
        epochs, slots = positions // self.epoch_rows, _in_epochs(positions, self.epoch_rows, f"{self.seed}/slots")
        result = np.empty_like(positions)
        first_row = first_slot = 0
        for source, (rows, uses) in enumerate(zip(self.rows, self.uses, strict=True)):
            chosen = (slots >= first_slot) & (slots < first_slot + uses)
            used_before = epochs[chosen] * uses + slots[chosen] - first_slot
            result[chosen] = first_row + _in_epochs(used_before, rows, f"{self.seed}/source {source}")
            first_row, first_slot = first_row + rows, first_slot + uses
        return result

    def sources_of(self, rows: Ints) -> Ints:
        """Returns the number of each row's source, from 0."""
        return np.searchsorted(np.cumsum(self.rows), rows, side="right").astype(np.int64)


def uses_by_weight(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Divides `total` rows among sources by their weights, exactly but for the rounding, which is by largest remainders."""
    whole = sum(map(Fraction, weights))
    shares = [Fraction(weight) * total / whole for weight in weights]
    uses = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: uses[source] - shares[source])
    for source in by_remainder[: total - sum(uses)]:
        uses[source] += 1
    return tuple(uses)
