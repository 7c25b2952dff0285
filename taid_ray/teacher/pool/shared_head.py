"""The teacher's head for all student workers of a run: asked of the replicas once, and handed on through Ray's object store.

A head may have gigabytes (1.5 GB with 152,064 rows of 5,120), which the replicas would otherwise send to every worker. Rank 0
reads it in pieces and puts each piece into the object store; Ray brings a piece to a node once, however many workers run
there. The references reach the other workers through the pool's lease, an actor, as arguments and results of calls: so Ray
counts who holds them, and frees the objects when the last worker has read them. (`ray.train.collective` pickles them itself,
and Ray then keeps the objects for as long as rank 0 lives.)

A head is handed on under a number of its own, so that neither an earlier attempt nor another run of the same pool can be
taken for it. There is no second way to get it: where a worker or the lease dies in between, the attempt ends with an
AttemptError, and the next one begins again.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

from taid_ray.distributed.world import World
from taid_ray.errors import AttemptError, MessageError, TeacherError
from taid_ray.models.head import Head
from taid_ray.teacher.fingerprint import head_digest
from taid_ray.teacher.pool.messages import HeadPiece
from taid_ray.teacher.protocol import TeacherInfo
from taid_ray.teacher.wire import unpack


def shared_head(
    world: World,
    lease: ActorHandle,
    info: TeacherInfo,
    fetch: Callable[[], Iterator[HeadPiece]],
    timeout_s: float,
) -> Head:
    """Returns the head's shared rows, on the CPU, in memory of this process. Collective: all ranks of `world` call it.

    fetch: asks the replicas for the head's pieces, in the order of the rows; called on rank 0 only. timeout_s: for the lease
    and for each piece. Raises TeacherError if what arrives is not the head in `info`, or if the object store cannot hold
    it; AttemptError if rank 0 or the lease is lost meanwhile.
    """
    if world.size == 1:
        return assemble(info, fetch())
    if world.is_main:
        references: list[ray.ObjectRef] = []
        head = assemble(info, _stored(fetch(), references))
        number = secrets.randbits(62)
        _get(lease.offer_head.remote(number, references), timeout_s)
        world.share(number)
    else:
        number = world.share(0)
        references = _get(lease.offered_head.remote(number), timeout_s)
        if references is None:
            raise AttemptError("the teacher pool's lease was restarted while it handed on the teacher's head")
        head = assemble(info, (_get(reference, timeout_s) for reference in references))
    world.barrier()  # all have read it
    if world.is_main:
        lease.withdraw_head.remote(number)
    return head


def assemble(info: TeacherInfo, pieces: Iterable[HeadPiece]) -> Head:
    """Returns the head that consists of these pieces, copied. Raises TeacherError if it is not the one in `info`."""
    dtype = getattr(torch, info.dtype)
    weight = torch.empty(info.num_shared, info.hidden_size, dtype=dtype)
    bias = torch.empty(info.num_shared, dtype=dtype) if info.has_bias else None
    try:
        row = 0
        for piece in pieces:
            part = unpack(piece.rows["weight"])
            rows = slice(row, row := row + len(part))
            weight[rows] = part
            if bias is not None:
                bias[rows] = unpack(piece.rows["bias"])
    except MessageError as error:
        raise TeacherError(f"the teacher's head arrived damaged ({error}); start the run again") from error
    head = Head(weight, bias, info.transform)
    if head_digest(head) != info.head_digest:
        raise TeacherError("the teacher's head arrived damaged (its checksum differs); start the run again")
    return head


def _stored(pieces: Iterator[HeadPiece], references: list[ray.ObjectRef]) -> Iterator[HeadPiece]:
    """Passes the pieces on, each put into the object store and its reference appended to `references`."""
    for piece in pieces:
        try:
            references.append(ray.put(piece))
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise TeacherError(
                "the teacher's head does not fit into the object store of rank 0's node, nor onto the disk that Ray spills "
                "to; start Ray with more --object-store-memory"
            ) from error
        yield piece


def _get(reference: ray.ObjectRef, timeout_s: float) -> Any:
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayError as error:
        raise AttemptError(
            "the teacher's head could not be handed from rank 0 to the other workers: rank 0 or the teacher pool's lease "
            f"was lost ({type(error).__name__})"
        ) from error
