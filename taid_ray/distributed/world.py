"""Rank and size of the group of student workers, and the exchange of control values within it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process's place among the student workers. Its methods are collective: every rank must call them alike."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """Place of this process in the initialised process group."""
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, element-wise in float64. The tensor stays on the CPU, so this works beside NCCL through gloo."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def share(self, value: int) -> int:
        """Returns rank 0's integer, on every rank."""
        shared = torch.tensor(value, dtype=torch.int64)
        if self.size > 1:
            dist.broadcast(shared, src=0)
        return int(shared.item())

    def share_bytes(self, value: bytes) -> bytes:
        """Returns rank 0's bytes, on every rank."""
        shared = torch.empty(self.share(len(value)), dtype=torch.uint8)
        if self.is_main:
            shared = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else shared
        self.broadcast(shared, source=0)
        return shared.numpy().tobytes()

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Gives every rank `source`'s values, in its own tensor on the CPU."""
        if self.size > 1:
            dist.broadcast(tensor, src=source)

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, on every rank."""
        found: list[T] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.sum([0.0])
