"""Kinds of data files, by their names; opening one, decompressed; its digest; what is said of text that is not UTF-8."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import xxhash

from taid_ray.data.reading.retried import BUFFER_BYTES, open_retried

Kind: TypeAlias = Literal["json", "parquet", "csv", "text", "tsv", "arrow"]

KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".ndjson": "json",
    ".tsv": "tsv",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
COMPRESSIBLE = ("json", "csv", "text", "tsv")
SUPPORTED = f"{', '.join(KINDS)}; text also as {', '.join(COMPRESSIONS)}"
"""The kinds of files that can be read, in words."""


@dataclass(frozen=True)
class DataFile:
    """One file of the data."""

    path: Path
    name: str
    """Its path below the directory that was named, with slashes, or its own name."""
    kind: Kind


def kind_of(path: Path) -> Kind | None:
    """Tells a file's kind by its name; None if it is not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = KINDS.get(suffixes[0]) if len(suffixes) == 2 else None
        return kind if kind in COMPRESSIBLE else None
    return KINDS.get(path.suffix.lower())


def stem_of(name: str) -> str:
    """Returns the name of a data file without the endings that tell its kind."""
    path = Path(name)
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSIONS else path.stem


def open_bytes(path: Path) -> io.BufferedReader:
    """Opens a file for reading, decompressed if its name says that it is compressed. Raises OSError, also while reading."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return open_retried(path)
    import pyarrow

    stream = pyarrow.input_stream(open_retried(path), compression=compression, buffer_size=BUFFER_BYTES)
    return io.BufferedReader(stream, BUFFER_BYTES)


def digest_of(path: Path) -> str:
    """Hashes the content of a file (xxh3, 128 bits), as it lies there. Raises OSError."""
    digest = xxhash.xxh3_128()
    with open_retried(path) as file:
        while part := file.read(BUFFER_BYTES):
            digest.update(part)
    return digest.hexdigest()


def not_utf8(path: Path) -> ValueError:
    """Makes the error for a file that is not UTF-8 text; it names the first line (from 1, ended by a newline) that is not."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                return ValueError("it is UTF-16 instead of utf-8 text; save it as utf-8")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return ValueError(f"line {number} is not utf-8 text: {error}")
    return ValueError("it is not utf-8 text")
