"""Rows of text files: each line that is not blank is a document, in the column `text`."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from taid_ray.data.reading.kinds import not_utf8, open_bytes


def read_text(path: Path, names: Sequence[str], skip: int) -> Iterator[dict[str, Any] | None]:
    r"""Yields the lines, ended by \n, \r\n or \r. See `rows.read_rows`."""
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        try:
            for line in lines:
                if not line.strip():
                    continue
                if skip:
                    skip -= 1
                    yield None
                else:
                    yield {"text": line.rstrip("\n")}
        except UnicodeDecodeError:
            raise not_utf8(path) from None


def text_columns(path: Path) -> list[str]:
    """Lists the columns of a text file."""
    return ["text"]
