"""Wire format of tensors: plain tuples around uint8 arrays, which Ray's object store reads without copying.

A torch tensor would be pickled instead, about ten times slower, and numpy has no bfloat16. A checksum travels beside the
tuples: memory and networks that flip a bit are rare, but a long run on many nodes meets them, and would learn from it.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from taid_ray.errors import MessageError

Packed = tuple[str, tuple[int, ...], np.ndarray]
"""Name of the torch dtype, shape, and the bytes as a one-dimensional uint8 array."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
        torch.int64, torch.int32, torch.int8, torch.uint8,
    )
}  # fmt: skip
"""The dtypes of requests, payloads and heads. Of these, every pattern of bits is a value."""
MAX_DIMENSIONS = 8
MAX_BYTES = 2**62
"""The largest tensor that torch can count."""

# What `unpack` returns lives in the object store and is read-only on purpose; torch would warn once per process.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def pack(tensor: Tensor) -> Packed:
    """Packs any strided tensor, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.view(torch.uint8).numpy()


def unpack(packed: Packed) -> Tensor:
    """Returns the tensor, on the CPU, sharing memory with `packed`. After a trip through Ray it must not be written to.

    Raises MessageError unless this is a tuple as `pack` makes it, of one of DTYPES, whose parts fit together.
    """
    name, shape, data = _checked(packed)
    if not data.size:
        return torch.empty(shape, dtype=DTYPES[name])  # torch cannot view no bytes as another dtype
    return torch.from_numpy(data).view(DTYPES[name]).view(shape)


def digest(tensors: Mapping[str, Packed]) -> str:
    """Computes a checksum (XXH3, 64 bits) of names, dtypes, shapes and bytes, whatever the order of the names.

    Guards against accidents only, at the speed of memory. Raises MessageError as `unpack`.
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise MessageError(f"packed tensors must have names (found a {type(tensors).__name__})")
    result = xxhash.xxh3_64()
    for name in sorted(tensors):
        dtype, shape, data = _checked(tensors[name])
        result.update(f"{name!a} {dtype} {shape}\n".encode())
        result.update(data.data)
    return result.hexdigest()


def verify(tensors: Mapping[str, Packed], checksum: str) -> None:
    """Raises MessageError unless `checksum` is the digest of these tensors, or they are no packed tensors."""
    found = digest(tensors)
    if found != checksum:
        raise MessageError(
            f"packed tensors do not have the checksum they were sent with (found {found}, expected {checksum!s:.16}); "
            "if this happens again, check memory and network of the nodes"
        )


def _checked(packed: Any) -> Packed:
    """Returns the tuple itself, for which `unpack` cannot fail. Errors show its parts only where these are short."""
    if type(packed) is not tuple or len(packed) != 3:
        raise MessageError(f"a packed tensor must be (dtype, shape, bytes) (found a {type(packed).__name__})")
    name, shape, data = packed
    if type(name) is not str or name not in DTYPES:
        shown = name if type(name) is str else type(name)
        raise MessageError(
            f"a packed tensor names the unknown dtype {shown!a:.40}; run the same taid-ray on all machines"
        )
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS or not all(type(n) is int for n in shape):
        raise MessageError(f"the shape of a packed tensor must be at most {MAX_DIMENSIONS} integers")
    # Zeros left out, because torch counts the strides of a tensor without elements, too.
    if min(shape, default=0) < 0 or math.prod(n for n in shape if n) * DTYPES[name].itemsize > MAX_BYTES:
        raise MessageError("the shape of a packed tensor must be of sizes that a tensor can have")
    if type(data) is not np.ndarray or data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise MessageError("the bytes of a packed tensor must be a one-dimensional contiguous array of uint8")
    expected = math.prod(shape) * DTYPES[name].itemsize
    if data.size != expected:
        raise MessageError(
            f"a packed tensor of shape {shape} and dtype {name} needs {expected} bytes (found {data.size}); run the same "
            "taid-ray on all machines"
        )
    return name, shape, data
