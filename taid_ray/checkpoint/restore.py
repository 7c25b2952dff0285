"""Reading the newest checkpoint that is whole, by all student workers together: each file once, by one of them."""

import json
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from taid_ray.checkpoint.store import (
    STATE_FILE,
    CheckpointStore,
    DamagedCheckpointError,
    File,
    Index,
    TornCheckpointError,
    TrainingState,
    step_of,
)
from taid_ray.distributed.world import World
from taid_ray.errors import CheckpointError


class Checkpoint:
    """A checkpoint that was read: what an attempt starts from. Its tensors are spread over the ranks."""

    def __init__(
        self,
        name: str,
        older: list[str],
        state: TrainingState,
        readers: dict[str, int],
        own: dict[str, Tensor],
        world: World,
    ):
        """older: the checkpoints before it. readers: the rank that has read each tensor; own: those of this rank."""
        self.name, self.older = name, older
        self.result, self.cursor, self.totals = state.result, state.cursor, state.totals
        self._readers, self._own, self._world = readers, own, world

    def tensor(self, key: str, shape: torch.Size) -> Tensor:
        """The float32 tensor `key`, on every rank's CPU. Collective.

        Raises CheckpointError, on every rank, if the checkpoint has none of that name and shape.
        """
        if key not in self._readers:
            raise CheckpointError(f"checkpoint {self.name} has no tensor {key}; it belongs to another student")
        reader = self._readers[key]
        found = self._own.get(key)
        wrong = found is not None and (found.shape != shape or found.dtype != torch.float32)
        if any(self._world.sum([float(wrong)])):
            raise CheckpointError(f"checkpoint {self.name} has another shape of {key}; it belongs to another student")
        value = found if found is not None else torch.empty(shape, dtype=torch.float32)
        self._world.broadcast(value, source=reader)
        return value

    def release(self) -> None:
        """Frees the tensors."""
        self._own.clear()


def restore(store: CheckpointStore, world: World, notify: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; None if none was ever finished. Collective.

    notify: told of those that are passed over. Raises CheckpointError if some were finished, but none can be read.
    """
    names = json.loads(world.share_bytes(json.dumps(store.names() if world.is_main else []).encode()))
    damaged = ""
    for number, name in enumerate(names):
        try:
            return _read(store, name, names[number + 1 :], world)
        except TornCheckpointError as error:
            if world.is_main:
                notify(
                    f"the checkpoint of step {step_of(name)} was not written to its end; it is passed over ({error})"
                )
        except DamagedCheckpointError as error:
            damaged = damaged or str(error)
            notify(f"the checkpoint of step {step_of(name)} is damaged; it is passed over ({error})")
    if damaged:
        raise CheckpointError(
            f"none of the {len(names)} checkpoints in {store.location} can be used: {damaged}; bring one back, or remove "
            "them all to begin at step 1"
        )
    return None


def _read(store: CheckpointStore, name: str, older: list[str], world: World) -> Checkpoint:
    """Raises TornCheckpointError or DamagedCheckpointError, the same kind on every rank."""
    index, state = _shared_state(store, name, world)
    files = sorted(file for file in index if file != STATE_FILE)
    readers = {tensor: i % world.size for i, file in enumerate(files) for tensor in index[file].tensors}
    own: dict[str, Tensor] = {}
    problem: CheckpointError | None = None
    try:
        for i, file in enumerate(files):
            if i % world.size == world.rank:
                own |= store.read_tensors(name, file, index[file])
        if missing := [key for key, reader in readers.items() if reader == world.rank and key not in own]:
            raise DamagedCheckpointError(f"{name} lacks the tensor {missing[0]}")
    except CheckpointError as error:
        problem = error
    (problems,) = world.sum([float(problem is not None)])
    if problems:
        raise DamagedCheckpointError(str(problem or "another worker found it damaged"))
    return Checkpoint(name, older, state, readers, own, world)


def _shared_state(store: CheckpointStore, name: str, world: World) -> tuple[Index, TrainingState]:
    """Index and state, which rank 0 reads for all."""
    message: dict[str, object] = {}
    if world.is_main:
        try:
            index = store.index(name)
            if STATE_FILE not in index:
                raise DamagedCheckpointError(f"{name} has no {STATE_FILE}")
            text = store.read(name, STATE_FILE, index[STATE_FILE])
            TrainingState.from_json(text)
            message = {"index": {file: asdict(found) for file, found in index.items()}, "state": text.decode()}
        except CheckpointError as error:
            message = {"torn": isinstance(error, TornCheckpointError), "error": str(error)}
    shared = json.loads(world.share_bytes(json.dumps(message).encode()))
    if "error" in shared:
        raise (TornCheckpointError if shared["torn"] else DamagedCheckpointError)(shared["error"])
    return {file: File(**found) for file, found in shared["index"].items()}, TrainingState.from_json(
        shared["state"].encode()
    )
