"""Prepared training data: what the driver hands to the workers so that each can read its rows of every global batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from taid_ray.config.data import DataConfig, SourceConfig
from taid_ray.data.encoding import Counts
from taid_ray.data.store.index import Index, Totals, together
from taid_ray.data.store.order import GlobalOrder, MixedOrder, Order, uses_by_weight
from taid_ray.data.store.reader import BatchReader, StoredRows
from taid_ray.data.store.remote import Location
from taid_ray.errors import DataError


@dataclass(frozen=True)
class PreparedSource:
    """One source of training data that is in the store as a whole."""

    index: Location
    """The index of its rows, see `index.write_index`; remote or in a directory that all nodes see."""
    fingerprint: dict[str, Any]
    """What tells its documents from others, see `data.fingerprint`."""
    images_directory: str | None = None
    """Folder or zip archive that the paths of its images are relative to."""

    @cached_property
    def opened(self) -> Index:
        """The index. Raises DataError if it is missing."""
        return Index(self.index)

    @property
    def counts(self) -> Counts:
        """Numbers of documents by what became of them; those kept for validation are not among them."""
        return Counts(**self.opened.totals.counts)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the open index, which every process maps for itself."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class PreparedData:
    """Training data that are in the store as a whole. Properties raise DataError if an index is missing."""

    sources: tuple[PreparedSource, ...]
    uses: tuple[int, ...]
    """Number of rows of each source in an epoch."""

    @property
    def totals(self) -> Totals:
        """Facts of the data as a whole, all rows of all sources counted once."""
        found = [source.opened.totals for source in self.sources]
        return found[0] if len(found) == 1 else _together(found)

    @property
    def rows(self) -> int:
        """Number of rows in an epoch."""
        return sum(self.uses)

    @property
    def counts(self) -> Counts:
        """Numbers of documents by what became of them; those kept for validation are not among them."""
        return Counts(**self.totals.counts)

    @property
    def digest(self) -> str:
        """Identifies the rows of all sources and their numbers in an epoch, which with a seed set the whole order."""
        if self._is_plain:
            return self.totals.digest
        mixed = [*(source.opened.totals.digest for source in self.sources), *map(str, self.uses)]
        return hashlib.sha256(" ".join(mixed).encode()).hexdigest()[:32]

    @property
    def _is_plain(self) -> bool:
        """True if an epoch has every row of the only source once."""
        return len(self.sources) == 1 and self.uses[0] == self.sources[0].opened.totals.rows

    def stored_rows(self) -> StoredRows:
        """Opens the rows of all sources, numbered one source after another."""
        directories = [source.images_directory for source in self.sources]
        return StoredRows([source.opened for source in self.sources], directories)

    def reader(self, seed: int, batch_size: int) -> BatchReader:
        """Opens the global batches of `batch_size` rows in the order that `seed` gives. Raises DataError."""
        rows = tuple(source.opened.totals.rows for source in self.sources)
        order: Order = GlobalOrder(rows[0], seed) if self._is_plain else MixedOrder(rows, self.uses, seed)
        return BatchReader(self.stored_rows(), order, batch_size)


def mixed(config: DataConfig, sources: Sequence[PreparedSource]) -> PreparedData:
    """Puts the sources of `config`, which are prepared, together in its proportions.

    Raises DataError if a source would have no row in an epoch.
    """
    rows = [source.opened.totals.rows for source in sources]
    if isinstance(config.train, str):
        return PreparedData(tuple(sources), tuple(rows))
    return PreparedData(tuple(sources), _uses(config.train, rows))


def _uses(sources: Sequence[SourceConfig], rows: Sequence[int]) -> tuple[int, ...]:
    weighted = [number for number, source in enumerate(sources) if source.weight is not None]
    uses = [source.rows or own for source, own in zip(sources, rows, strict=True)]
    if weighted:
        weights = [source.weight for source in sources if source.weight is not None]
        total = sum(rows[number] for number in weighted)
        for number, share in zip(weighted, uses_by_weight(weights, total), strict=True):
            if not share:
                raise DataError(
                    f"data.train[{number}].weight = {sources[number].weight:g} gives {sources[number].path} none of the "
                    f"{total:,} rows of an epoch; raise it, or remove the source"
                )
            uses[number] = share
    return tuple(uses)


def _together(found: Sequence[Totals]) -> Totals:
    names = dict.fromkeys(name for totals in found for name in totals.counts)
    return Totals(
        hashlib.sha256(" ".join(totals.digest for totals in found).encode()).hexdigest()[:32],
        rows=sum(totals.rows for totals in found),
        documents=sum(totals.documents for totals in found),
        tokens=sum(totals.tokens for totals in found),
        loss_tokens=sum(totals.loss_tokens for totals in found),
        highest_id=max(totals.highest_id for totals in found),
        counts={name: sum(totals.counts.get(name, 0) for totals in found) for name in names},
        media=together([totals.media for totals in found]),
    )
