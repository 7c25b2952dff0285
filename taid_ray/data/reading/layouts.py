"""Directories with a layout of their own: what `save_to_disk` of the library datasets writes, and clones of hub data sets."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from taid_ray.data.reading.kinds import SUPPORTED, DataFile, kind_of
from taid_ray.data.reading.splits import Choice, listed
from taid_ray.errors import DataError, shortened

SAVED_DICT, SAVED_STATE = "dataset_dict.json", "state.json"
METADATA = ("dataset_info.json", "dataset_infos.json", SAVED_DICT, SAVED_STATE)
"""Names of JSON files that describe data and hold none."""


def saved_files(directory: Path, choice: Choice) -> tuple[list[DataFile], list[str]] | None:
    """Lists the files of a Dataset or DatasetDict that `save_to_disk` wrote, in their order, and what is to be said.

    None if the directory holds neither. Raises DataError for a split that is not there, and for damaged descriptions.
    """
    if (directory / SAVED_DICT).is_file():
        splits = [str(name) for name in _described(directory / SAVED_DICT, choice)["splits"]]
        name = choice.among(splits, f"{choice.source} is a saved DatasetDict that")
        said = [
            f"{choice.source} is a saved DatasetDict with the splits {listed(splits)}; {name!r} is read ({choice.key})"
        ]
        return _saved_split(directory / name, f"{name}/", choice), said
    if (directory / SAVED_STATE).is_file() and (directory / "dataset_info.json").is_file():
        return _saved_split(directory, "", choice), [f"{choice.source} is a saved Dataset"]
    return None


def _saved_split(directory: Path, prefix: str, choice: Choice) -> list[DataFile]:
    state = _described(directory / SAVED_STATE, choice)
    if state.get("_indices_data_files"):  # older versions of the library kept a choice of rows beside the rows
        raise DataError(
            f"{choice.source}: {directory} holds a choice of rows as indices, which cannot be read. Load it with the "
            f"library datasets, call flatten_indices(), and save it again."
        )
    names = [str(file["filename"]) for file in state["_data_files"]]
    return [DataFile(directory / name, prefix + name, "arrow") for name in names]


def _described(path: Path, choice: Choice) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == SAVED_DICT:
            list(content["splits"])
        else:
            [file["filename"] for file in content["_data_files"]]
        return dict(content)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{choice.source}: {path} does not describe a saved data set ({type(error).__name__}: {error}). "
            f"Save the data again."
        ) from None


def configured_files(directory: Path, choice: Choice) -> tuple[list[DataFile], list[str]] | None:
    """Lists the files that the README.md of a hub data set's clone names for a subset and split, and what is to be said.

    None if it names none. Raises DataError if the subset or the split is not there, or has files that cannot be read.
    """
    if not _has_configs(directory / "README.md"):
        return None
    import datasets  # which knows all ways in which files can be named there

    try:
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(str(directory), choice.subset, cache_dir=cache)
        found = {str(split): [Path(file) for file in files] for split, files in builder.config.data_files.items()}
    except (ValueError, OSError) as error:  # no such subset, or no files of such a name
        raise DataError(
            f"{choice.source}: the subsets that its README.md describes cannot be used "
            f"({shortened(str(error))}). Set data.subset, or name a file."
        ) from None
    subset = builder.config.name
    split = choice.among(list(found), f"the subset {subset!r} of {choice.source}")
    files = []
    for path in found[split]:
        if (kind := kind_of(path)) is None:
            raise DataError(f"{choice.source}: {path} cannot be read. Convert it to one of: {SUPPORTED}.")
        files.append(DataFile(path, os.path.relpath(path, directory), kind))
    said = f"{choice.source}: as its README.md says, subset {subset!r}, splits {listed(list(found))}; {split!r} is read"
    return files, [f"{said} ({choice.key})"]


def _has_configs(readme: Path) -> bool:
    """Tests whether the YAML at the head of a README.md names files."""
    if not readme.is_file():
        return False
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return False
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return False
    return isinstance(head, dict) and bool(head.get("configs"))
