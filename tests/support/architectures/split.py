"""A teacher split over two processes, as `teacher.shards: 2` splits it, kept for one architecture after the other."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from taid_ray.config.models import TeacherConfig
from taid_ray.data.batch import Batch
from taid_ray.errors import TaidRayError
from taid_ray.media.processor import MediaSettings
from tests.support.architectures.fields import VOCAB

SHARDS = 2
WAIT_S = 120.0
"""After this time without an answer one process is taken to wait for the other, which has given up."""


class SplitTeacher:
    """Two processes with a shard each. They are started when first asked, and again after a hang."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._ends: list[Connection] = []

    def hidden(
        self, model: Path, batch: Batch, media: MediaSettings | None = None, contents: dict[str, bytes] | None = None
    ) -> Tensor:
        """Computes the hidden states [N, H], float32, that the leader answers with.

        media: how images are processed, if there are any. contents: their bytes, by digest. Raises what the package raises,
        or RuntimeError for anything else.
        """
        if not self._processes:
            self._start()
        for end in self._ends:
            end.send((str(model), batch, media, contents))
        if not all(end.poll(WAIT_S) for end in self._ends):
            self.close()
            raise RuntimeError(f"no answer within {WAIT_S:.0f} s from all {SHARDS} shards")
        answers = [end.recv() for end in self._ends]
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if errors:
            if not all(isinstance(answer, TaidRayError) for answer in answers):
                self.close()  # one shard may be further than the other
            raise errors[0]
        return torch.from_numpy(answers[0])

    def close(self) -> None:
        """Ends both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._ends = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(SHARDS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store.port, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._ends.append(ours)


def _serve(rank: int, port: int, end: Connection) -> None:
    """One shard: loads what it is asked for, and sends the answer or the error."""
    import transformers

    from taid_ray.teacher.model import TeacherModel
    from taid_ray.teacher.pool.shard import load_shard

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    store = TCPStore("127.0.0.1", port)
    while True:
        model, batch, media, contents = end.recv()
        config = TeacherConfig(model=model, dtype="float32", shards=SHARDS)
        try:
            if torch.distributed.is_initialized():
                teacher = TeacherModel(config, VOCAB, torch.device("cpu"), leader=rank == 0, media=media)
            else:
                teacher = load_shard(config, VOCAB, "cpu", rank, store, media)
            answer = _answer(teacher, batch, contents)
            end.send(answer["hidden"].numpy() if answer else None)
        except TaidRayError as error:
            end.send(error)
        except Exception as error:
            end.send(RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def _answer(teacher: Any, batch: Batch, contents: dict[str, bytes]) -> dict[str, Tensor]:
    shown = teacher.pictures(batch.images, lambda image: contents[image.digest])
    found: dict[str, Tensor] = teacher.score(batch.inputs, batch.loss_positions, batch.labels, shown)
    return found
