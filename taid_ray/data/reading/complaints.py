"""How errors of reading are told: whatever a parser raises becomes one DataError that ends in the root cause."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from taid_ray.data.columns import Column
from taid_ray.errors import DataError, shortened
from taid_ray.storage import LASTING_ERRORS


@contextmanager
def explained(source: str, what: str) -> Iterator[None]:
    """Raises whatever the block raises as a DataError: `source`, `what`, and the root cause in brackets. DataErrors pass."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, LASTING_ERRORS):
            what = "cannot be read. Check the disk or the network that it is on"  # nothing is wrong with the data
        raise DataError(f"{source} {what} ({shortened(str(cause)) or type(cause).__name__}).") from None


def empty(source: str) -> DataError:
    """Makes the error for data without a row."""
    return DataError(f"{source} is empty. Name data that hold at least one document.")


def no_column(source: str, column: Column, found: Sequence[str], data_format: str) -> DataError:
    """Makes the error for data that lack a required column. found: the names of those that they have."""
    names = " or ".join(repr(name) for name in column.names)
    shown = [name if name.isprintable() else ascii(name) for name in found]
    has = " ".join(", ".join(shown).split())[:300]
    return DataError(
        f"{source} has no column {names} (it has: {has}). "
        f"Set {column.key}, or data.format if {data_format!r} is not what the data are."
    )
