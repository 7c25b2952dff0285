"""Tensors on the wire: plain tuples around uint8 arrays, which Ray's object store reads without copying.

A torch tensor would be pickled instead, about ten times slower, and numpy has no bfloat16.
"""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from taid_ray.errors import TeacherError

Packed = tuple[str, tuple[int, ...], np.ndarray]
"""Name of the torch dtype, shape, and the bytes as a one-dimensional uint8 array."""

# What `unpack` returns lives in the object store and is read-only on purpose; torch would warn once per process.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def pack(tensor: Tensor) -> Packed:
    """Any strided tensor, without a copy if it is contiguous and on CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.view(torch.uint8).numpy()


def unpack(packed: Packed) -> Tensor:
    """The tensor, on CPU, sharing memory with `packed`. After a trip through Ray it must not be written to.

    Raises TeacherError if dtype, shape and number of bytes do not fit together.
    """
    name, shape, data = packed
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TeacherError(f"a packed tensor names the unknown dtype {name!r}; run the same taid-ray on all machines")
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or data.dtype != np.uint8 or data.size != expected:
        raise TeacherError(
            f"a packed tensor of shape {shape} and dtype {name} needs {expected} bytes (found {data.size} x "
            f"{data.dtype}); run the same taid-ray on all machines"
        )
    if not expected:
        return torch.empty(shape, dtype=dtype)  # torch cannot view no bytes as another dtype
    return torch.from_numpy(data).view(dtype).view(shape)
