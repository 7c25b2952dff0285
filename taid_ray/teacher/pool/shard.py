"""One process of a replica's tensor-parallel group: how it joins the group and loads its part of the teacher."""

import asyncio
import os
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from taid_ray.config.models import TeacherConfig
from taid_ray.distributed.device import collective_backend, torch_device
from taid_ray.media.processor import MediaSettings
from taid_ray.models.hub import offline_if_unreachable
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.pool.messages import PackedPictures, ScoreRequest, unpacked_pictures

LOOPBACK = "127.0.0.1"  # a replica's placement group lies on one node
GROUP_TIMEOUT = timedelta(minutes=30)  # shards may finish loading a large model at very different times


class TeacherShard:
    """One process of a tensor-parallel teacher, other than the leader. Runs as an actor; blocking work in threads."""

    async def load(
        self,
        config: TeacherConfig,
        num_shared: int,
        device_kind: str,
        rank: int,
        port: int,
        media: MediaSettings | None = None,
    ) -> None:
        """Loads this shard, together with the others. port: of the leader's TCPStore on this node."""

        def work() -> TeacherModel:
            store = TCPStore(LOOPBACK, port, timeout=GROUP_TIMEOUT)
            return load_shard(config, num_shared, device_kind, rank, store, media)

        self._model = await asyncio.to_thread(work)

    async def score(self, request: ScoreRequest, *shown: PackedPictures) -> None:
        """Takes this shard's part in a computation, or in one for each of several sets of images of the request."""

        def work() -> None:
            inputs = request.unpacked()
            for pictures in shown or [()]:
                self._model.score(*inputs, unpacked_pictures(pictures))

        await asyncio.to_thread(work)

    async def ping(self) -> None:
        """Answers, and so shows that this process lives."""


def load_shard(
    config: TeacherConfig,
    num_shared: int,
    device_kind: str,
    rank: int,
    store: TCPStore | None,
    media: MediaSettings | None = None,
) -> TeacherModel:
    """Joins the replica's process group, if it has one, and loads this shard. All shards call it together."""
    if device_kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers would otherwise split the model over the node's GPUs
    if store is not None:
        os.environ["LOCAL_RANK"] = "0"  # transformers' index of the GPU; Ray shows each shard one only
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group(
            collective_backend(device_kind), store=store, rank=rank, world_size=config.shards, timeout=GROUP_TIMEOUT
        )
    offline_if_unreachable([config.model])
    return TeacherModel(config, num_shared, torch_device(device_kind), leader=rank == 0, media=media)
