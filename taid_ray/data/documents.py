"""Opening datasets and reading them block by block, with errors that say what is wrong with a file."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
from datasets import Dataset, IterableDataset

from taid_ray.config.schema import DataConfig
from taid_ray.data.columns import columns_of
from taid_ray.data.encoding import Columns
from taid_ray.errors import DataError

Documents: TypeAlias = Dataset | IterableDataset

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
BLANK_BYTES = 1 << 10
LARGE_FILES = 50 << 20  # bytes; preparing less takes no time worth a progress bar


def open_documents(config: DataConfig, which: Literal["train", "valid"]) -> Documents:
    """Opens `config.train` or `config.valid` and checks that the columns which the format reads are there."""
    if which == "valid" and config.valid is not None:
        name, split = config.valid, config.valid_split
    else:
        name, split = config.train, config.split
    documents = load_documents(name, config.subset, split, config.streaming, f"data.{which}")
    present = documents.column_names or list(next(iter(documents)))
    for column in columns_of(config):
        if column.required and column.name not in present:
            found = " ".join(", ".join(present).split())[:300]
            raise DataError(
                f"data.{which}: {name} has no column {column.name!r} (it has: {found}). "
                f"Set {column.key}, or data.format if {config.format!r} is not what the data are."
            )
    return documents


def load_documents(name: str, subset: str | None, split: str, streaming: bool, key: str) -> Documents:
    """Opens a local file, a directory of such files (`subset` and `split` do not apply), or a dataset of the hub.

    A name is local if it exists, begins with '.', '/' or '~', or ends like a data file. Text files give one document
    per line that is not blank. Raises DataError, naming `key` (`data.train` or `data.valid`).
    """
    source = f"{key}: {name}"
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, of an unknown user, or with a NUL
        raise DataError(f"{source}: this cannot be the name of a file ({error}). Name an existing one.") from None
    if exists or name.startswith((".", "/", "~")) or path.suffix.lower() in READERS:
        with _explained(source, "cannot be read. Check its permissions"):
            files = _local_files(path, source)
            size = sum(file.stat().st_size for file in files)
            if not size or (size < BLANK_BYTES and not any(file.read_bytes().strip() for file in files)):
                raise _empty(source)
        reader = READERS[files[0].suffix.lower()]
        names = [glob.escape(str(file)) for file in files]  # `datasets` takes them for patterns
        arguments: dict[str, Any] = {"path": reader, "data_files": {"train": names}, "split": "train"}
        what, progress = f"cannot be read as {reader}. Repair or convert the file", size > LARGE_FILES
    else:
        reader, arguments = None, {"path": name, "name": subset, "split": split}
        what, progress = "cannot be loaded from the hub. Check the name, data.subset and split, or name a file", True
    with _explained(source, what), _quiet(progress):
        documents: Documents = datasets.load_dataset(streaming=streaming, **arguments)
        if reader == "text":
            documents = documents.filter(_has_text, input_columns="text", batched=True)
        first = next(iter(documents), None)
    if first is None:
        raise _empty(source)
    return documents


def num_documents(documents: Documents) -> int | None:
    """The number of documents; None for a stream."""
    return len(documents) if isinstance(documents, Dataset) else None


def read_blocks(
    documents: Documents, config: DataConfig, source: str, skip: int, size: int
) -> Iterator[tuple[int, Columns]]:
    """Yields the documents after the first `skip`, in blocks of `size` (the last may be shorter) with the first row's number.

    Rows are numbered from 1. Only the columns that `config.format` reads; None where a row lacks one.
    """
    blocks = _slices(documents, skip, size) if isinstance(documents, Dataset) else documents.skip(skip).iter(size)
    while True:
        with _explained(source, f"cannot be read after row {skip}. Repair the data"):
            block = next(blocks, None)
        if block is None:
            return
        if not block:
            raise DataError(f"{source}: the rows after row {skip} have no columns. Remove them.")
        count = len(next(iter(block.values())))
        yield skip + 1, {column.name: block.get(column.name) or [None] * count for column in columns_of(config)}
        skip += count


def _slices(documents: Dataset, skip: int, size: int) -> Iterator[Columns]:
    for start in range(skip, len(documents), size):
        yield documents[start : start + size]


def _local_files(path: Path, source: str) -> list[Path]:
    """Lists the file itself, or all data files below the directory, sorted. Raises DataError unless they are of one kind."""
    supported = ", ".join(READERS)
    if not path.exists():
        raise DataError(f"{source}: no such file or directory. Name an existing one ({supported}) or a hub dataset.")
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"{source}: files of the kind {path.suffix!r} cannot be read. Convert it to one of: {supported}."
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    kinds = sorted({READERS[file.suffix.lower()] for file in files})
    if not files:
        raise DataError(f"{source}: the directory holds no data files. Put files of one kind there ({supported}).")
    if len(kinds) > 1:
        raise DataError(
            f"{source}: the directory mixes {' and '.join(kinds)} files. Keep those of one kind, or name a file."
        )
    return files


def _has_text(lines: list[str]) -> list[bool]:
    return [bool(line.strip()) for line in lines]


def _empty(source: str) -> DataError:
    return DataError(f"{source} is empty. Name data that hold at least one document.")


@contextmanager
def _explained(source: str, what: str) -> Iterator[None]:
    """Turns whatever `datasets` raises while reading into one line that ends in the root cause."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if datasets.config.HF_HUB_OFFLINE and isinstance(error, ConnectionError):
            raise DataError(
                f"{source} cannot be loaded from the hub, which does not answer, and is not in the cache. "
                f"Name a local file or directory ({', '.join(READERS)})."
            ) from None
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise DataError(f"{source} {what} ({reason[:300]}).") from None


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Silences the log of `datasets`, whose errors we report ourselves, and its progress bars unless wanted."""
    verbosity, had_bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not progress:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars and not progress:
            datasets.enable_progress_bars()
