"""Data files for tests of the store of encoded data."""

from pathlib import Path

from taid_ray.data.reading.kinds import DataFile, kind_of


def data_file(path: Path) -> DataFile:
    """The file as the reading of data knows it."""
    kind = kind_of(path)
    assert kind is not None
    return DataFile(path, path.name, kind)


def story(number: int) -> str:
    """A text of its own for every number, of 10 to 90 tokens."""
    return f"Once upon a time, story {number} began." + " The dog ran to the cat." * (number % 11)
