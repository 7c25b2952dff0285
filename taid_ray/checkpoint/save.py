"""Writer of checkpoints: each rank's share, beside the training, and which checkpoints are kept."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress

from torch import Tensor

from taid_ray.checkpoint.restore import Checkpoint
from taid_ray.checkpoint.store import (
    STATE_FILE,
    STORAGE_ERRORS,
    CheckpointStore,
    Index,
    TornCheckpointError,
    TrainingState,
    checkpoint_name,
    step_of,
    tensor_file,
)
from taid_ray.config.schema import DistillConfig
from taid_ray.distributed.world import World
from taid_ray.errors import CheckpointError

PART_BYTES = 2**30
"""Bytes of tensors in one file at most; a file is put together in memory."""
MOST_FAILURES = 3
"""Failures in a row that end the run, for one that cannot save its state must not go on for days."""
POLL_S = 0.5


class CheckpointWriter:
    """Saves one run's checkpoints, on one rank. `save`, `wait` and `close` are collective."""

    def __init__(
        self,
        store: CheckpointStore,
        config: DistillConfig,
        world: World,
        attempt: int,
        checkpoint: Checkpoint | None,
        notify: Callable[[str], None],
    ):
        """checkpoint: the one that this attempt continues from. notify: told of what was saved, and of what failed."""
        self._store, self._config, self._world, self._attempt = store, config.checkpoint, world, attempt
        self._timeout_s, self._note = config.peer_timeout_s, notify
        self._kept = sorted([checkpoint.name, *checkpoint.older]) if checkpoint else []
        self._last_save = time.monotonic()
        self._thread: threading.Thread | None = None
        self._written: Future[None] = Future()
        self._give_up = threading.Event()
        self._failures = 0
        self._step = 0

    def due(self, step: int) -> bool:
        """Tests whether this rank finds a checkpoint due after `step`, by steps or by the clock."""
        every, minutes = self._config.every_steps, self._config.every_minutes
        late = minutes is not None and time.monotonic() - self._last_save >= 60 * minutes
        return late or bool(every and step % every == 0)

    def name(self, step: int) -> str:
        """Name of this attempt's checkpoint of `step`."""
        return checkpoint_name(step, self._attempt)

    def save(
        self, step: int, state: TrainingState, tensors: Iterable[tuple[str, Tensor | None]], best: str | None
    ) -> None:
        """Takes a copy of everything now and writes it in the background, once the previous checkpoint is written.

        tensors: name, and the tensor on the CPU where it is this rank's to write. best: name of the checkpoint to keep,
        however old it is. Raises CheckpointError, on every rank, after MOST_FAILURES in a row.
        """
        self.wait()
        if self._failures >= MOST_FAILURES:
            raise CheckpointError(
                f"no checkpoint could be written {self._failures} times in a row, the last one after step {self._step}; see "
                f"the messages before; make room in {self._store.location}, and start the run again to resume it"
            )
        own = [(key, tensor) for key, tensor in tensors if tensor is not None]
        self._step, self._last_save = step, time.monotonic()
        self._written, self._give_up = Future(), threading.Event()
        self._thread = threading.Thread(
            target=self._write, args=(self.name(step), state, own, best), name="taid-checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def newest(self) -> int:
        """Step of the newest checkpoint that is written, 0 if there is none. Known to rank 0 only."""
        return step_of(self._kept[-1]) if self._kept else 0

    def close(self) -> None:
        """Waits until the last checkpoint is written. Raises CheckpointError, on every rank, if it could not be."""
        self.wait()
        if self._failures:
            raise CheckpointError(
                f"the checkpoint of step {self._step} could not be written; see the message before; "
                "the run resumes from an older one"
            )

    def discard(self, step: int, best: str | None) -> None:
        """Removes the newest checkpoint, if it is of `step` and not the best one: the finished run has no use for it."""
        if self._world.is_main and self.newest == step and self._kept[-1] != best:
            with suppress(*STORAGE_ERRORS):  # it only takes room
                self._store.delete(self._kept.pop())

    def describe_newest(self) -> str:
        """A sentence that says where the run could go on from."""
        if not self._kept:
            return "There is no checkpoint yet."
        return (
            f"The last good checkpoint is of step {step_of(self._kept[-1])}: {self._store.location}/{self._kept[-1]}."
        )

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, and counts it if any rank failed to write its part.

        Raises CheckpointError, on every rank, if the storage has not taken it in time.
        """
        if self._thread is None:
            return
        own, late = None, False
        try:
            own = self._written.exception(timeout=self._timeout_s)
        except TimeoutError:
            late = True
        failed, stuck = self._world.sum([float(own is not None), float(late)])
        if failed or stuck:
            self._give_up.set()  # rank 0 would wait for a part that never comes
        if not stuck:
            self._thread.join(2 * self._timeout_s)
            (stuck,) = self._world.sum([float(self._thread.is_alive())])
        if stuck:
            raise self._stuck()
        self._thread = None
        self._failures = self._failures + 1 if failed else 0
        if failed and self._world.is_main:
            with suppress(*STORAGE_ERRORS):  # what was written of it only takes room
                self._store.delete(self.name(self._step))

    def _stuck(self) -> CheckpointError:
        return CheckpointError(
            f"{self._store.location} has not taken the checkpoint of step {self._step} within {self._timeout_s:.0f} s "
            "(student.timeout_s); look after the storage, and start the run again to resume it"
        )

    def _write(self, name: str, state: TrainingState, own: list[tuple[str, Tensor]], best: str | None) -> None:
        start = time.monotonic()
        try:
            num_bytes = self._write_own(name, state, own)
        except Exception as error:  # reported by `wait`, on every rank
            self._note(f"the checkpoint of step {step_of(name)} could not be written, training goes on: {error}")
            self._written.set_exception(error)
            return
        self._written.set_result(None)
        if not self._world.is_main:
            return
        try:
            if self._all_written(name):
                seconds, mib = time.monotonic() - start, num_bytes * self._world.size / 2**20
                self._note(f"checkpoint of step {step_of(name)} saved ({mib:.0f} MiB in {seconds:.1f} s)")
                self._prune(name, best)
        except (CheckpointError, *STORAGE_ERRORS) as error:
            self._note(f"checkpoints in {self._store.location}: {error}")

    def _write_own(self, name: str, state: TrainingState, own: list[tuple[str, Tensor]]) -> int:
        files: Index = {}
        if self._world.is_main:
            files[STATE_FILE] = self._store.write(name, STATE_FILE, state.to_json(), [])
        for number, part in enumerate(_parts(own)):
            file = tensor_file(self._world.rank, number)
            files[file] = self._store.write_tensors(name, file, dict(part))
        self._store.finish(name, self._world.rank, self._world.size, files)
        return sum(file.bytes for file in files.values())

    def _all_written(self, name: str) -> bool:
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            try:
                self._store.index(name)
                return True
            except TornCheckpointError:
                if self._give_up.wait(POLL_S):
                    return False
        return False

    def _prune(self, name: str, best: str | None) -> None:
        """Keeps the newest whole checkpoints and the best one; what else there is, torn ones for example, goes."""
        self._kept = sorted({*self._kept, name})[-self._config.keep :]
        for other in self._store.names():
            if other not in (*self._kept, best):
                self._store.delete(other)


def _parts(tensors: list[tuple[str, Tensor]]) -> list[list[tuple[str, Tensor]]]:
    parts: list[list[tuple[str, Tensor]]] = []
    room = 0
    for key, tensor in tensors:
        if not parts or room < tensor.nbytes:
            parts.append([])
            room = PART_BYTES
        parts[-1].append((key, tensor))
        room -= tensor.nbytes
    return parts
