"""Choice of devices, and of what depends on them. Nothing else in the package chooses one."""

from typing import Literal

import torch

from taid_ray.errors import ClusterError

DeviceKind = Literal["cpu", "cuda"]


def resolve(config_device: Literal["auto", "cpu", "cuda"], cluster_has_gpus: bool) -> DeviceKind:
    """Resolves the configuration key `device` on this cluster. Raises ClusterError for `cuda` without GPUs."""
    if config_device == "cuda" and not cluster_has_gpus:
        raise ClusterError("device: cuda needs a GPU, but no node of the cluster has a GPU; set device: cpu or add one")
    return "cuda" if cluster_has_gpus and config_device != "cpu" else "cpu"


def torch_device(kind: str, local_rank: int = 0) -> torch.device:
    """Returns this process's device, and makes it the current one.

    Ray shows an actor only its own GPUs, so that `local_rank` is 0 there; Ray Train shows a worker all of its node's.

    Raises ClusterError if torch sees no such GPU.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ClusterError(
            f"device: cuda needs GPU {local_rank} in this process, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()}; install a CUDA build of torch on every GPU node, or set device: cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def collective_backend(kind: str) -> str:
    """Backend of torch.distributed. On GPUs gloo carries CPU tensors beside nccl, for control values."""
    return "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"


def loss_memory_mib(device: torch.device) -> int:
    """Default of `loss.memory_mib`: caches favour small chunks on a CPU, matmuls need large ones on a GPU."""
    return 128 if device.type == "cpu" else 2048
