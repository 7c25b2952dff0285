"""Splits of a data set in a directory: which one is wanted, and which files belong to it, by their names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from taid_ray.data.reading.kinds import DataFile, stem_of
from taid_ray.errors import DataError

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names of files and directories, as the library datasets understands them, and the split that they mean."""
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")
"""Names of a hub data set's files in `data/`, which begin with a split of any name."""
MOST_LISTED = 5


@dataclass(frozen=True)
class Choice:
    """What is wanted of a directory."""

    source: str
    """Begins every message: the key of the data, and their name."""
    key: str
    """The key of the split: data.split or data.valid_split."""
    split: str
    subset: str | None

    def among(self, splits: Sequence[str], what: str) -> str:
        """Returns the one of `splits` that is wanted. Raises DataError, about `what`, if it is not among them."""
        for split in (self.split, SPLIT_WORDS.get(self.split, self.split)):
            for name in splits:
                if split in (name, SPLIT_WORDS.get(name)):
                    return name
        raise DataError(
            f"{what} has no split {self.split!r} (it has: {listed(splits)}). Set {self.key} to one of these, or name a file."
        )


def files_of_split(files: list[DataFile], choice: Choice) -> tuple[list[DataFile], list[str]]:
    """Chooses the files of the wanted split, and says what was chosen. Without names of several splits, that is all files.

    Files whose names tell no split are those of `train` where no file is named so. Raises DataError if the wanted split has
    no files.
    """
    named: dict[str | None, list[DataFile]] = {}
    for file in files:
        named.setdefault(split_of(file.name), []).append(file)
    splits = [split for split in named if split is not None]
    wanted = SPLIT_WORDS.get(choice.split, choice.split) if choice.split not in splits else choice.split
    if set(splits) <= {wanted}:
        return files, []
    if len(named) == 1:
        return files, [f"{choice.source}: all files are of the split {splits[0]!r} by their names; all are read"]
    chosen = named.get(wanted) or (named.get(None) if wanted == "train" else None)
    if chosen is None:
        wanted = choice.among(splits, choice.source)
        chosen = named[wanted]
    left = [
        f"{file.name} ({split or 'no split'})" for split, each in named.items() for file in each if each is not chosen
    ]
    return chosen, [
        f"{choice.source}: by the names of its files, {len(chosen)} of {len(files)} are of the split {wanted!r} and are read "
        f"({choice.key}); left out: {listed(left)}"
    ]


def split_of(name: str) -> str | None:
    """Tells the split of a file by its path below the directory of the data; None if the path names none, or several."""
    *folders, file = PurePosixPath(name).parts
    stem = stem_of(file)
    shard = SHARD.fullmatch(stem)
    if folders == ["data"] and shard and _split_word(shard[1]):
        return shard[1] if shard[1] not in SPLIT_WORDS else SPLIT_WORDS[shard[1]]
    for part in reversed(folders):
        if split := _split_word(part):
            return split
    return _split_word(stem)


def _split_word(name: str) -> str | None:
    words = {SPLIT_WORDS[word] for word in re.split(r"[-._ \d]+", name.lower()) if word in SPLIT_WORDS}
    return words.pop() if len(words) == 1 else None


def counted(number: int, what: str) -> str:
    """Writes a number with its noun, which takes an s in the plural."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def listed(items: Sequence[str]) -> str:
    """Names the items, of many only the first."""
    rest = len(items) - MOST_LISTED
    return ", ".join(items[:MOST_LISTED]) + (f" and {rest} more" if rest > 0 else "")
