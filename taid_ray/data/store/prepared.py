"""Prepared training data: what the driver hands to the workers so that each can read its rows of every global batch."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from taid_ray.data.encoding import Counts
from taid_ray.data.store.index import Index, Totals
from taid_ray.data.store.order import GlobalOrder
from taid_ray.data.store.reader import BatchReader, StoredRows
from taid_ray.data.store.remote import Location


@dataclass(frozen=True)
class PreparedData:
    """Training data that are in the store as a whole."""

    index: Location
    """The index of their rows, see `index.write_index`; remote or in a directory that all nodes see."""
    fingerprint: dict[str, Any]
    """What tells these documents from others, see `data.fingerprint`."""

    @cached_property
    def _opened(self) -> Index:
        return Index(self.index)

    @property
    def totals(self) -> Totals:
        """Facts of the data as a whole. Raises DataError if the index is missing."""
        return self._opened.totals

    @property
    def rows(self) -> int:
        """Number of rows, which one epoch uses once each."""
        return self.totals.rows

    @property
    def counts(self) -> Counts:
        """Numbers of documents by what became of them; those kept for validation are not among them."""
        return Counts(**self.totals.counts)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the open index, which every process maps for itself."""
        return {"index": self.index, "fingerprint": self.fingerprint}

    def reader(self, seed: int, batch_size: int) -> BatchReader:
        """Opens the global batches of `batch_size` rows in the order that `seed` gives. Raises DataError."""
        index = self._opened
        return BatchReader(StoredRows([index]), GlobalOrder(index.totals.rows, seed), batch_size)
