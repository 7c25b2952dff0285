"""Fingerprint of a run's data: what a resumed run must find again, whatever the path is, and what has changed if it does not.

Of local files it holds name, size, a hash of the content and the number of rows; of a data set of the hub a hash of what is
read; of a stream, which is not read at once, names and sizes of files, or the name only. Two fingerprints are the same if the
files hold the same, in the same order, under whatever names, and if their first rows have the same
tokens, which another tokenizer or chat template changes. With `data.order: global` the documents are known when they are
prepared; until then there are only names and sizes to compare.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import xxhash

from taid_ray.data.batch import Row
from taid_ray.data.documents import Documents
from taid_ray.data.reading.splits import counted
from taid_ray.errors import DataError

Fingerprint: TypeAlias = dict[str, Any]
"""`train` and `valid` (None without `data.valid`), each as `Documents.fingerprint` gives it; `rows`, a hash of the first rows;
with `data.order: global`, once the data are prepared, `index`, which identifies all rows; with teacher.mode: file `outputs`, a
hash of teacher.outputs. Of several sources, `sources` holds `train` and `valid` of each, and there is no `train` beside it. As
JSON can hold it."""

MOST_SHOWN = 3
UNREAD = "unread"
"""Key in what is known of documents whose names and sizes are all that is known yet."""


def fingerprint(train: Documents, valid: Documents | None, read_train: bool = True) -> Fingerprint:
    """Takes the fingerprint of a run's documents. Reads all of them once, unless they are streams. Raises DataError.

    read_train: whether to read the training data, too; else there are only their names and sizes in it.
    """
    found = train.fingerprint() if read_train else train.outline() | {UNREAD: True}
    return {"train": found, "valid": None if valid is None else valid.fingerprint()}


def rows_digest(rows: Iterable[Row]) -> str:
    """Hashes the tokens of rows, which of them carry loss, and their images."""
    result = xxhash.xxh3_128()
    for row in rows:
        result.update(json.dumps([x.tolist() for x in (row.input_ids, row.position_ids, row.targets)]).encode())
        if row.images:
            result.update(json.dumps([[image.digest, image.start] for image in row.images]).encode())
    return result.hexdigest()


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Says what has changed, key by key; nothing if the data are the same."""
    old, new = before.get("sources"), now.get("sources")
    if old is None or new is None or len(old) != len(new):
        found = [] if old is new else [f"data.train: {_listed(old)} then, {_listed(new)} now"]
    else:
        pairs = enumerate(zip(old, new, strict=True))
        found = [
            change
            for number, (then, this) in pairs
            for change in _changed(then, this, f"data.train[{number}].path", f"data.train[{number}].valid")
        ]
    found = found or _changed(before, now, "data.train", "data.valid")
    if before.get("outputs") != now.get("outputs"):
        found.append("teacher.outputs: the content of the file has changed")
    if not found and any(key in before and key in now and before[key] != now[key] for key in ("rows", "index")):
        begin = "the documents are the same, but their tokens are not: the tokenizer"
        if any(UNREAD in (part.get("train") or {}) for part in (now, *now.get("sources", ()))):
            begin = "the first rows are not the same: the documents, the tokenizer"
        found.append(f"{begin}, the chat template or taid-ray itself has changed")
    return found


def check_outline(driver: Fingerprint, number: int, train: Documents, key: str) -> None:
    """Raises DataError if this process finds other files in a source of training data, by name and size, than the driver did.

    They were replaced meanwhile, or the node has a copy of its own. Hashing them would take every worker too long. number: that
    of the source. key: the one it was given under.
    """
    seen = driver["sources"][number] if "sources" in driver else driver
    then, now = (
        {"files": [_outline(file) for file in data.get("files", [])]} for data in (seen["train"], train.outline())
    )
    if not _same(then, now):
        raise DataError(
            f"{key}: node {os.uname().nodename} does not find the files that the driver has read: "
            f"{_difference(then, now)}. Give all nodes the same files, and start the run again to resume it."
        )


def _changed(before: Fingerprint, now: Fingerprint, train_key: str, valid_key: str) -> list[str]:
    """Says what has changed in the documents of one source."""
    found = []
    for which, key in (("train", train_key), ("valid", valid_key)):
        old, new = before.get(which), now.get(which)
        if not _same(old, new):
            found.append(f"{key}: {_difference(old, new)}")
    return found


def _listed(sources: Sequence[Fingerprint] | None) -> str:
    return "one source" if sources is None else f"a list of {counted(len(sources), 'source')}"


def _outline(file: Mapping[str, Any]) -> dict[str, Any]:
    return {key: file[key] for key in ("name", "kind", "bytes")}


def _same(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> bool:
    """Compares the contents; where the new ones are still unread, kinds and sizes of files."""
    if old is None or new is None:
        return old is new
    if "files" not in old or "files" not in new:
        return old.get("hub") == new.get("hub") if UNREAD in new else old == new
    pairs = zip(old["files"], new["files"], strict=False)
    return len(old["files"]) == len(new["files"]) and all(_same_file(*pair, UNREAD in new) for pair in pairs)


def _same_file(old: Mapping[str, Any], new: Mapping[str, Any], unread: bool) -> bool:
    if unread:
        return bool((old["kind"], old["bytes"]) == (new["kind"], new["bytes"]))
    then, now = (file.get("digest") or (file["name"], file["bytes"]) for file in (old, new))
    return bool((old["kind"], then) == (new["kind"], now))


def _difference(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    if old is None or new is None:
        return "it was not set then" if old is None else "it is not set any more"
    if "files" not in old or "files" not in new:
        return f"then {_named(old)}, now {_named(new)}"
    before, now = ({file["name"]: file for file in data["files"]} for data in (old, new))
    if len(before) == len(now) == 1:
        ((name, one),), (other,) = before.items(), now.values()
        return _change(name, one, other)
    said = [
        *(
            _change(name, before[name], now[name])
            for name in before
            if name in now and not _same_file(before[name], now[name], UNREAD in new)
        ),
        *(f"{name} is gone" for name in before if name not in now),
        *(f"{name} is new" for name in now if name not in before),
    ]
    return _shown(said or ["its files are in another order"])


def _change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    what = "row" if "rows" in old and "rows" in new else "byte"
    sizes = [counted(file[f"{what}s"], what) for file in (old, new)]
    return f"{name} has changed" + (f" ({sizes[0]} then, {sizes[1]} now)" if sizes[0] != sizes[1] else "")


def _named(data: Mapping[str, Any]) -> str:
    return "local files" if "files" in data else ", ".join(f"{key} {value}" for key, value in data.items())


def _shown(said: Sequence[str]) -> str:
    rest = len(said) - MOST_SHOWN
    return ", ".join(said[:MOST_SHOWN]) + (f", and {rest} more changes" if rest > 0 else "")
