"""The teacher's head for all student workers: asked of the pool once, and handed on through the object store."""

import ray
import torch
from ray.train.collective import barrier, broadcast_from_rank_zero

from taid_ray.errors import TeacherError
from taid_ray.models.loading import Head
from taid_ray.teacher.model import head_digest
from taid_ray.teacher.protocol import TeacherClient
from taid_ray.teacher.wire import pack, unpack


def shared_head(teacher: TeacherClient, rank: int) -> Head:
    """The head's shared rows, on the CPU. Collective: every worker of a Ray Train group calls it.

    A head may have gigabytes (1.5 GB with 152,064 rows of 5,120), which the replicas would have to send to every worker.
    Instead, Ray brings it to each node once. Raises TeacherError if what arrives is not the pool's head.
    """
    own = teacher.head() if rank == 0 else None  # rank 0 holds it until all have read it
    reference = None
    if own is not None:
        parts = {"weight": own.weight} | ({} if own.bias is None else {"bias": own.bias})
        reference = ray.put({name: pack(tensor) for name, tensor in parts.items()})
    # In a list, so that Ray hands on the reference and not the object.
    shared = broadcast_from_rank_zero([reference])
    head = own
    if head is None:
        read: dict[str, torch.Tensor] = {name: unpack(part).clone() for name, part in ray.get(shared[0]).items()}
        info = teacher.info()
        head = Head(read["weight"], read.get("bias"), info.transform)
        if head_digest(head) != info.head_digest:
            raise TeacherError("the head handed on by rank 0 is not that of the teacher pool; start the run again")
    barrier()
    return head
