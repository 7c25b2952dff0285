import numpy as np
import pytest
import torch

from taid_ray.errors import TeacherError
from taid_ray.wire import pack, unpack


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool,
        torch.int32, torch.int8, torch.float8_e4m3fn,
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (4,), ()])
def test_round_trip_keeps_bits_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 10).to(dtype)
    back = unpack(pack(tensor))
    assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)


def test_neither_direction_copies() -> None:
    tensor = torch.randn(4, 4)
    packed = pack(tensor)
    tensor[0, 0] = 42
    assert unpack(packed)[0, 0] == 42


def test_strided_tensors_and_gradients_are_left_behind() -> None:
    tensor = torch.randn(4, 6, requires_grad=True)
    back = unpack(pack(tensor[:, ::2].T))
    assert torch.equal(back, tensor[:, ::2].T) and not back.requires_grad


def test_reads_read_only_memory() -> None:
    name, shape, data = pack(torch.ones(3))
    data.setflags(write=False)
    assert unpack((name, shape, data)).sum() == 3


@pytest.mark.parametrize(
    "packed",
    [
        ("float99", (2,), np.zeros(8, np.uint8)),
        ("Tensor", (2,), np.zeros(8, np.uint8)),
        ("float32", (3,), np.zeros(8, np.uint8)),
        ("float32", (-1, -2), np.zeros(8, np.uint8)),
        ("float32", (2,), np.zeros(8, np.float32)),
    ],
)
def test_refuses_what_does_not_fit_together(packed: tuple[str, tuple[int, ...], np.ndarray]) -> None:
    with pytest.raises(TeacherError, match="packed tensor"):
        unpack(packed)
