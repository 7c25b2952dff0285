from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from taid_ray.errors import MessageError, TeacherError
from taid_ray.teacher.wire import DTYPES, digest, pack, unpack, verify


@pytest.mark.parametrize("dtype", DTYPES.values())
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


BYTES = np.zeros(8, np.uint8)


@pytest.mark.parametrize(
    "packed",
    [
        ("float99", (2,), BYTES),
        ("Tensor", (2,), BYTES),
        ("bool", (8,), BYTES),
        ("qint8", (8,), BYTES),
        ("complex64", (1,), BYTES),
        ("\ud800" * 1000, (2,), BYTES),
        (None, (2,), BYTES),
        (["float32"], (2,), BYTES),
        ("float32", (3,), BYTES),
        ("float32", (-1, -2), BYTES),
        ("float32", (2**62, 4), BYTES),
        ("float32", (2**63,), BYTES[:0]),
        ("float32", (0, 2**62), BYTES[:0]),
        ("float32", (2**40, 0, 2**40), BYTES[:0]),
        ("float32", (10**5000,), BYTES),
        ("float32", (1,) * 9 + (2,), BYTES),
        ("float32", (True, 2), BYTES),
        ("float32", (2.0,), BYTES),
        ("float32", [2], BYTES),
        ("float32", 2, BYTES),
        ("float32", None, BYTES),
        ("float32", (2,), BYTES.view(np.float32)),
        ("float32", (2,), BYTES.reshape(2, 4)),
        ("float32", (2,), np.zeros(16, np.uint8)[::2]),
        ("float32", (2,), np.ma.array(BYTES)),
        ("float32", (2,), bytes(8)),
        ("float32", (2,), torch.zeros(2)),
        ("float32", (2,), None),
        ("float32", (2,)),
        ("float32", (2,), BYTES, BYTES),
        ["float32", (2,), BYTES],
        (),
        None,
        7,
    ],
)
def test_refuses_what_does_not_fit_together(packed: Any) -> None:
    for read in (unpack, lambda x: digest({"x": x}), lambda x: verify({"x": x}, "")):
        with pytest.raises(MessageError, match="packed tensor"):
            read(packed)
    assert not issubclass(MessageError, TeacherError), "the cache reads files with it, where no teacher is to blame"


@pytest.mark.parametrize("shape", [(0, 2**60), (2**60, 0), (0, 0)])
def test_empty_tensors_of_any_possible_shape(shape: tuple[int, ...]) -> None:
    assert unpack(("float32", shape, BYTES[:0])).shape == shape


def tensors() -> dict[str, torch.Tensor]:
    return {"ids": torch.arange(6, dtype=torch.int32).view(2, 3), "scale": torch.ones(2)}


def test_the_digest_is_of_what_is_sent_and_of_nothing_else() -> None:
    sent = {name: pack(tensor) for name, tensor in tensors().items()}
    verify({name: (dtype, shape, data.copy()) for name, (dtype, shape, data) in sent.items()}, digest(sent))
    verify(OrderedDict(reversed(sent.items())), digest(sent))
    assert digest({}) != digest(sent)


@pytest.mark.parametrize("bit", range(8))
def test_one_damaged_bit_is_noticed(bit: int) -> None:
    sent = {name: pack(tensor) for name, tensor in tensors().items()}
    checksum = digest(sent)
    for _, _, data in sent.values():
        for place in range(data.size):
            data[place] ^= 1 << bit
            with pytest.raises(MessageError, match="do not have the checksum they were sent with"):
                verify(sent, checksum)
            data[place] ^= 1 << bit
    verify(sent, checksum)


def test_damaged_names_dtypes_and_shapes_are_noticed() -> None:
    sent = {name: pack(tensor) for name, tensor in tensors().items()}
    dtype, shape, data = sent["ids"]
    for wrong in (
        {"ids": sent["ids"]},
        sent | {"more": sent["scale"]},
        {"idt": sent["ids"], "scale": sent["scale"]},
        sent | {"ids": ("float32", shape, data)},
        sent | {"ids": (dtype, (3, 2), data)},
        sent | {"ids": (dtype, (6,), data)},
    ):
        with pytest.raises(MessageError, match="checksum"):
            verify(wrong, digest(sent))
    for garbage in (None, [sent["ids"]], {1: sent["ids"]}, "ids"):
        with pytest.raises(MessageError, match="must have names"):
            digest(garbage)  # type: ignore[arg-type]
