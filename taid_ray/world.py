"""This process's place among the student workers, and the sums over them that control needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise float64 sum over ranks. The tensor stays on the CPU, so this works beside NCCL through gloo."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def share(self, value: int) -> int:
        """Rank 0's integer, on every rank."""
        shared = torch.tensor(value, dtype=torch.int64)
        if self.size > 1:
            dist.broadcast(shared, src=0)
        return int(shared.item())

    def barrier(self) -> None:
        self.sum([0.0])
