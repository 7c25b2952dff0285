"""What identifies a teacher: hashes of its head, of its answer to a probe, and of everything that its answers depend on."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from taid_ray.config.models import TeacherConfig
from taid_ray.media.processor import MediaProcessor
from taid_ray.models.head import Head
from taid_ray.models.lengths import uniform_length
from taid_ray.teacher.wire import pack

SUMS = 1021
"""A prime, so that two rows of a matrix that change places change the sums."""


def head_digest(head: Head) -> str:
    """Returns the SHA-256 of the bytes of weight and bias."""
    return digest(head.weight, *([] if head.bias is None else [head.bias]))


def digest(*tensors: Tensor) -> str:
    """Returns the SHA-256 of the bytes of tensors."""
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(pack(tensor)[2].data)
    return result.hexdigest()


def fingerprint(model: Any, num_shared: int, teacher: TeacherConfig, media: MediaProcessor | None = None) -> str:
    """Hashes the model's config, what is sent of its answers, and sums over the bits of every whole parameter.

    media: what makes inputs of images, whose identity is hashed, too, where the model is shown some. The same however
    the model is split. Collective for a tensor-parallel teacher, which gathers one parameter at a time.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "distributed_config")}
    if uniform_length(model.config) is not None:
        # Before rows were kept that short, what a cache holds may depend on the rows that were computed with a sample.
        config["longest_row"] = uniform_length(model.config)
    sent: list[Any] = [num_shared, teacher.payload, teacher.topk if teacher.payload == "topk" else None]
    if media is not None:
        sent.append(media.identity())
    result = hashlib.sha256(json.dumps([config, *sent], sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        result.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        for part in bit_sums(whole.detach()):
            result.update(pack(part)[2].data)
    return result.hexdigest()


def bit_sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns SUMS sums over all bits of a tensor, read as int64, and the bytes at its end that fill no whole group of them.

    Computed on its device, in one pass. Not a hash, but a weight that changes or moves changes a sum.
    """
    flat = tensor.contiguous().view(-1)
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()  # else torch does not read it as int64
    bits = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
    whole = bits.numel() // (8 * SUMS) * 8 * SUMS
    # Sums of integers come out the same in any order, on any device; what overflows wraps around.
    return bits[:whole].view(-1, 8 * SUMS).view(torch.int64).sum(0), bits[whole:]
