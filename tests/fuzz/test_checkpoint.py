"""Whatever became of the files of two checkpoints: the newest one that is what was written, or an error; never other values."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from taid_ray.checkpoint.restore import restore
from taid_ray.checkpoint.store import STATE_FILE, CheckpointStore, TrainingState, checkpoint_name, step_of, tensor_file
from taid_ray.data.cursor import BlockCursor
from taid_ray.distributed.world import World
from taid_ray.errors import CheckpointError
from taid_ray.scheduler.aggregate import StepResult
from taid_ray.scheduler.schedule import ScheduleState
from tests.support.feeding import FRAGMENTS, feed, mutated

OLD, NEW = checkpoint_name(10, 3), checkpoint_name(20, 3)
RANKS = 2
Files = dict[str, bytes | None]
"""Contents by path; None stands for a directory."""
ODD_JSON = [
    b"", b"null", b"[]", b"{}", b"3", b'"x"', b"[" * 100_000, b"NaN", b"1e999", b"9" * 5000, b'{"world_size": 2}',
    b'{"world_size": 2, "files": null}', b'{"world_size": 2, "files": {"state.json": null}}',
    b'{"world_size": 99999999, "files": {}}', b'{"world_size": true, "files": {}}',
    b'{"world_size": 2, "files": {"../../x": {"bytes": 0, "digest": "", "tensors": []}}}',
    b'{"format": 1}', b'{"format": 2}', b'{"format": 1, "result": null, "cursor": {}, "record": {}}',
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None,
    0,
    1,
    -1,
    2,
    10**30,
    0.5,
    float("nan"),
    "",
    "x",
    [],
    {},
    [None],
    [["w0"]],
    {"a": 1},
    True,
]
ODD_PATHS = [
    "step-1",
    "step-x-1",
    "step-000000030-1",
    "step-\u0663-1",
    "other",
    "step-000000025-1/rank-00000.json",
    "step-26-1/x",
]


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step_of(name))
    return {f"w{n}": torch.randn(n + 1, 3, generator=generator) for n in range(4)}


def state_of(name: str) -> TrainingState:
    schedule = ScheduleState(0.5, 0.1, 0.01, 2.5, step_of(name))
    return TrainingState(
        StepResult(step_of(name), schedule, 1.5, 2.5, tokens=9), BlockCursor(1, 2, 3, step_of(name)), {"best": None}
    )


def written(root: Path) -> Files:
    """Two checkpoints of two ranks, as `saving` writes them."""
    store = CheckpointStore(str(root))
    for name in (OLD, NEW):
        tensors = list(tensors_of(name).items())
        for rank in range(RANKS):
            own = dict(tensors[rank::RANKS])
            files = {tensor_file(rank, 0): store.write_tensors(name, tensor_file(rank, 0), own)}
            if rank == 0:
                files[STATE_FILE] = store.write(name, STATE_FILE, state_of(name).to_json(), [])
            store.finish(name, rank, RANKS, files)
    return contents(root)


def contents(root: Path) -> Files:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


@st.composite
def damaged(draw: st.DrawFn, whole: Files) -> Files:
    """The files after up to three changes."""
    files = dict(whole)
    paths = st.sampled_from([path for path, content in whole.items() if content])
    for _ in range(draw(st.integers(0, 3))):
        path = draw(paths)
        how = draw(st.sampled_from(["bytes", "bytes", "index", "index", "drop", "copy", "odd", "directory", "stray"]))
        content = files.get(path)
        if how == "bytes" and content:
            files[path] = draw(mutated([content], FRAGMENTS))
        elif how == "index":
            path = draw(st.sampled_from([path for path in whole if path.endswith(".json")]))
            files[path] = draw(other_values(files.get(path) or b"{}"))
        elif how == "drop":
            files.pop(path, None)
        elif how == "copy":
            files[path] = whole[draw(paths)]
        elif how == "odd":
            files[path] = draw(st.sampled_from(ODD_JSON))
        elif how == "directory":
            files[path] = None
        elif how == "stray":
            files[draw(st.sampled_from(ODD_PATHS))] = draw(st.sampled_from([None, *ODD_JSON]))
    return files


@st.composite
def other_values(draw: st.DrawFn, content: bytes) -> bytes:
    """JSON with one of its values, at any depth, replaced, doubled under another key, or left out."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return content
    node, steps = tree, draw(st.sampled_from([0, 1, 2, 2, 2]))
    while isinstance(node, dict) and node:
        key = draw(st.sampled_from(sorted(node)))
        if not steps or not isinstance(node[key], dict):
            how = draw(st.sampled_from(["replace", "replace", "move", "drop"]))
            value = node.pop(key)
            if how != "drop":
                node["x" if how == "move" else key] = draw(st.sampled_from(ODD_VALUES)) if how == "replace" else value
            break
        node, steps = node[key], steps - 1
    return json.dumps(tree).encode()


def laid_out(root: Path, files: Files) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, content in files.items():
        place = root / path
        if content is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    """A checkpoint that nobody touched is never given up, and reading leaves every file as it is."""
    whole = written(tmp_path / "whole")
    store = CheckpointStore(str(tmp_path / "run"))
    passed_over = 0

    def check(files: Files) -> None:
        nonlocal passed_over
        laid_out(tmp_path / "run", files)
        before, notes = contents(tmp_path / "run"), []
        untouched = [n for n in (NEW, OLD) if all(files.get(p) == c for p, c in whole.items() if p.startswith(n))]
        try:
            found = restore(store, World(), notes.append)
        except CheckpointError as error:
            assert not untouched, error
            assert store.location in str(error)
        else:
            assert found is not None or not untouched
            if found is not None:
                assert not untouched or found.name >= untouched[0]
                assert TrainingState(found.result, found.cursor, found.totals) == state_of(found.name)
                check_tensors(found, untouched)
        passed_over += bool(notes)
        assert contents(tmp_path / "run") == before

    def check_tensors(found: Any, untouched: list[str]) -> None:
        for key, tensor in tensors_of(found.name).items():
            try:
                assert torch.equal(found.tensor(key, tensor.shape), tensor)
            except CheckpointError as error:
                assert found.name not in untouched and key in str(error)

    feed(damaged(whole), 1000, check)
    assert passed_over > 200


def test_states_of_any_shape() -> None:
    """A state whose checksum is right, as another version or a hand may write it."""

    def check(content: bytes) -> None:
        try:
            state = TrainingState.from_json(content)
        except CheckpointError:
            return
        assert TrainingState.from_json(state.to_json()).to_json() == state.to_json()

    original = state_of(NEW).to_json()
    feed(mutated([original]) | other_values(original) | st.sampled_from(ODD_JSON), 1000, check)
