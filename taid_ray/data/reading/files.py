"""The files that the name of local data stands for."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from taid_ray.config.paths import is_pattern
from taid_ray.data.reading.kinds import COMPRESSIONS, SUPPORTED, DataFile, Kind, kind_of
from taid_ray.data.reading.layouts import METADATA, configured_files, saved_files
from taid_ray.data.reading.retried import open_retried, size_of
from taid_ray.data.reading.splits import Choice, files_of_split, listed
from taid_ray.errors import DataError

ALWAYS_READ = (".json", ".jsonl", ".parquet", ".csv", ".txt")
"""Endings whose kind decides what a directory holds; files of other endings only join."""
PAPERS = ("license", "licence", "readme", "notice", "citation", "changelog", "requirements")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024


def is_local(name: str) -> bool:
    """Tells whether data of this name are local: it exists, begins with '.', '/' or '~', is a pattern, or ends like a data file.

    Raises ValueError if it cannot be the name of a file.
    """
    try:
        path = Path(name).expanduser()
        return path.exists() or name.startswith((".", "/", "~")) or is_pattern(name) or kind_of(path) is not None
    except (OSError, RuntimeError, ValueError) as error:  # too long, of an unknown user, or with a NUL
        raise ValueError(f"this cannot be the name of a file ({error})") from None


def select_files(path: Path, choice: Choice) -> tuple[list[DataFile], list[str]]:
    """Lists the files to read, in their order, and sentences that say what was chosen and what was left out.

    path: the file itself; a directory that `save_to_disk` wrote; the clone of a hub data set whose README.md names files;
    any other directory, of which all data files of one kind are read, sorted by their paths; or, if nothing has this name, a
    pattern for files, which are chosen and sorted as those of a directory. Hidden files and directories are left out, links
    are followed. Raises DataError.
    """
    if not path.exists() and not is_pattern(str(path)):
        raise DataError(
            f"{choice.source}: no such file or directory. Name an existing one ({SUPPORTED}) or a hub dataset."
        )
    if "[" in choice.split or "+" in choice.split:
        raise DataError(
            f"{choice.key}: {choice.split!r} is a part of a split, which only data on the hub have. Name a file with these rows."
        )
    if path.is_file():
        if (kind := kind_of(path)) is None:
            raise DataError(
                f"{choice.source}: files of the kind {path.suffix!r} cannot be read. Convert it to one of: {SUPPORTED}."
            )
        found: tuple[list[DataFile], list[str]] = [DataFile(path, path.name, kind)], []
    elif path.is_dir():
        found = (
            saved_files(path, choice) or configured_files(path, choice) or _plain_files(path, _below(path, ()), choice)
        )
    else:
        root = next(parent for parent in path.parents if parent.is_dir())  # taken literally, whatever signs are in it
        found = _plain_files(root, _matching(root, str(path.relative_to(root)), choice.source), choice)
    for file in found[0]:
        _refuse_pointer(file.path, choice.source)
    return found


def _plain_files(
    directory: Path, entries: Iterable[tuple[Path, str]], choice: Choice
) -> tuple[list[DataFile], list[str]]:
    """The data files among `entries` below a directory whose layout nothing describes."""
    found: list[DataFile] = []
    left: list[str] = []
    for path, reason in sorted(entries, key=lambda each: each[0].parts):
        kind = None if reason else kind_of(path)
        name = path.relative_to(directory).as_posix()
        if kind is None:
            left.append(f"{name} ({reason or 'no data file'})")
        else:
            found.append(DataFile(path, name, kind))
    descriptions = [file for file in found if file.path.name in METADATA]
    if len(descriptions) < len(found):  # where there are no others, they are data of an unlucky name
        left.extend(f"{file.name} (no data file)" for file in descriptions)
        found = [file for file in found if file not in descriptions]
    found = _once_each(found, left, directory)
    files = _of_one_kind(found, left, choice.source)
    files, said = files_of_split(files, choice)
    if choice.subset is not None:
        said.append(f"{choice.source}: data.subset {choice.subset!r} is not used, for nothing there describes subsets")
    if left:
        said.append(f"{choice.source}: left out: {listed(left)}")
    return files, said


def _once_each(found: list[DataFile], left: list[str], directory: Path) -> list[DataFile]:
    """The files without those that a link leads to a second time; these join `left`."""
    root, first = os.path.realpath(directory), dict[str, DataFile]()
    for file in sorted(found, key=lambda file: os.path.join(root, file.name) != os.path.realpath(file.path)):
        known = first.setdefault(os.path.realpath(file.path), file)  # the file itself, before links to it
        if known is not file:
            left.append(f"{file.name} (the same file as {known.name})")
    return [file for file in found if first[os.path.realpath(file.path)] is file]


def _matching(root: Path, pattern: str, source: str) -> Iterator[tuple[Path, str]]:
    """Yields what a pattern matches below a directory, with the reason if it is left out. Raises DataError for nothing."""
    names = glob.glob(pattern, root_dir=root, recursive=True)
    if not names:
        raise DataError(
            f"{source}: no file matches this pattern, of which {root} exists. Correct it (** stands for folders of any depth; "
            f"hidden files are not matched), or name an existing file or directory."
        )
    for path in (root / name for name in names):
        if path.is_file():
            yield path, ""
        elif not path.is_dir():
            yield path, "a link to nothing"
        elif "**" not in pattern:
            yield path, "a directory"


def _below(directory: Path, above: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """All files below a directory, and what is not looked into, each with the reason why it is left out, if it is."""
    real = os.path.realpath(directory)
    for entry in os.scandir(directory):
        path = directory / entry.name
        if entry.name.startswith("."):
            yield path, "hidden"
        elif entry.is_dir():
            if os.path.realpath(path) in (*above, real):
                yield path, "a link to a directory around it"
            else:
                yield from _below(path, (*above, real))
        elif entry.is_file():
            yield path, ""
        elif entry.is_symlink():
            yield path, "a link to nothing"


def _of_one_kind(found: list[DataFile], left: list[str], source: str) -> list[DataFile]:
    """The files of the kind that the directory holds; of the others, those that clearly are no data join `left`."""
    found = _without_copies(found, left)
    kinds = _kinds([file for file in found if file.path.suffix.lower() in ALWAYS_READ]) or _kinds(found)
    if len(kinds) > 1 and "text" in kinds:
        papers = [file for file in found if file.kind == "text" and file.path.name.lower().startswith(PAPERS)]
        left.extend(f"{file.name} (no data file)" for file in papers)
        found = [file for file in found if file not in papers]
        kinds = _kinds([file for file in found if file.kind in kinds])
    if not found:
        raise DataError(
            f"{source} holds no data files. Put files of one kind there ({SUPPORTED})."
            + (f" Left out: {listed(left)}." if left else "")
        )
    if len(kinds) > 1:
        raise DataError(
            f"{source} mixes {' and '.join(kinds)} files. Keep those of one kind, or name a file or a pattern."
        )
    left.extend(f"{file.name} (the others are {kinds[0]} files)" for file in found if file.kind not in kinds)
    return [file for file in found if file.kind in kinds]


def _kinds(files: list[DataFile]) -> list[Kind]:
    return sorted({file.kind for file in files})


def _without_copies(found: list[DataFile], left: list[str]) -> list[DataFile]:
    """The files without those that are compressed copies of the file beside them."""
    names = {file.name for file in found}
    copies = [
        file for file in found if file.path.suffix.lower() in COMPRESSIONS and file.name.rpartition(".")[0] in names
    ]
    left.extend(f"{file.name} (the file beside it is read)" for file in copies)
    return [file for file in found if file not in copies]


def _refuse_pointer(path: Path, source: str) -> None:
    """Raises DataError for what git leaves in place of a large file that was not downloaded."""
    if size_of(path) > POINTER_BYTES:
        return
    with open_retried(path) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(
                f"{source}: {path} is a Git LFS pointer, not the data. Run `git lfs pull` in the clone, or download it again."
            )
