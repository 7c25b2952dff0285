"""Rows of JSON files by Python's json module: JSON Lines, one array, one object around an array, or objects in a row."""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Any

from taid_ray.data.reading.kinds import not_utf8, open_bytes

Line = tuple[int, bytes]
"""A line with its number, from 1."""

LINE_SUFFIXES = (".jsonl", ".ndjson")
PEEK_ROWS = 1000
MAY_BE_SEVERAL = re.compile(rb"\}\s*\{")
SPACE = re.compile(r"[ \t\n\r]*")


def read_json(path: Path, names: Sequence[str], skip: int) -> Iterator[dict[str, Any] | None]:
    """Yields the objects of a file. See `rows.read_rows`.

    A file is JSON Lines if its first line that is not blank holds an object; then it is read line by line. Any other file is
    parsed as a whole: an array of objects, or of texts (which are the column `text`); an object that has none of `names`,
    but one array of objects that do; or one object after another. Raises ValueError, naming the line, for anything else.
    """
    with open_bytes(path) as file:
        if file.peek().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from _passing_over(_whole(path, names), skip)
            return
        lines = _lines(file)
        first = list(islice(lines, 2))
        if not first:
            return
        try:
            rows = objects_of_line(*first[0])
        except ValueError as error:
            yield from _passing_over(_whole(path, names, error), skip)
            return
        if len(first) == len(rows) == 1 and (inner := _wrapped(rows[0], names)) is not None:
            yield from _passing_over(iter(inner), skip)
            return
        for number, line in chain(first, lines):
            if skip and not MAY_BE_SEVERAL.search(line):
                skip -= 1
                yield None
                continue
            for row in objects_of_line(number, line):
                yield None if skip else row
                skip -= bool(skip)


def is_json_lines(path: Path) -> bool:
    """Tells whether `read_json` reads the file line by line, and finds more than one line in it. Raises OSError."""
    with open_bytes(path) as file:
        first = list(islice(_lines(file), 2))
    try:
        return len(first) == 2 and bool(objects_of_line(*first[0]))
    except ValueError:
        return False


def json_columns(path: Path) -> list[str]:
    """Lists the keys of the first rows, in the order of their appearance."""
    return list(dict.fromkeys(key for row in islice(read_json(path, (), 0), PEEK_ROWS) for key in row or ()))


def _lines(file: BufferedReader) -> Iterator[Line]:
    """The lines that are not blank, without the mark that some programs put before UTF-8 text."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace() and line:
            yield number, line


def objects_of_line(number: int, line: bytes) -> list[dict[str, Any]]:
    """Parses the objects on a line: one, or several where a newline got lost. Raises ValueError that names its `number`."""
    try:
        values = _parsed(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} is not utf-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or too many brackets
        raise ValueError(f"line {number}: {error}") from None
    for value in values:
        if not isinstance(value, dict):
            raise ValueError(f"line {number} holds {_kind(value)} instead of an object")
    return values


def _parsed(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _values(text)


def _values(text: str) -> list[Any]:
    """The JSON values that stand one after another in a text."""
    decoder, values, at = json.JSONDecoder(), [], _after_space(text, 0)
    while at < len(text):
        value, end = decoder.raw_decode(text, at)
        values.append(value)
        at = _after_space(text, end)
    return values


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _whole(path: Path, names: Sequence[str], first_error: ValueError | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file that is not JSON Lines. first_error: why its first line is no object."""
    with open_bytes(path) as file:
        content = file.read()
    try:
        values = _values(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (ValueError, RecursionError) as error:
        is_lines = any(suffix.lower() in LINE_SUFFIXES for suffix in path.suffixes[-2:])
        raise (first_error if first_error and is_lines else ValueError(str(error))) from None
    if len(values) == 1 and isinstance(values[0], list):
        rows = [{"text": value} if isinstance(value, str) else value for value in values[0]]
    elif len(values) == 1 and isinstance(values[0], dict):
        inner = _wrapped(values[0], names)
        rows = values if inner is None else inner
    else:
        rows = values
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"its value number {number} is {_kind(row)} instead of an object")
    return iter(rows)


def _wrapped(value: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]] | None:
    """The one array of objects in an object that has none of `names`, if they have some."""
    wanted = set(names)
    arrays = [
        inner
        for inner in value.values()
        if isinstance(inner, list) and inner and all(isinstance(x, dict) for x in inner)
    ]
    if value.keys() & wanted or len(arrays) != 1:
        return None
    return arrays[0] if any(row.keys() & wanted for row in arrays[0]) else None


def _passing_over(rows: Iterator[dict[str, Any]], skip: int) -> Iterator[dict[str, Any] | None]:
    for number, row in enumerate(rows):
        yield None if number < skip else row


def _kind(value: Any) -> str:
    named = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return named.get(type(value), "a number")
