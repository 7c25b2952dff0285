"""Whatever arrives instead of a teacher's answer raises MessageError or TeacherError, or has exactly the answer's bytes."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from taid_ray.config.models import Payload
from taid_ray.errors import MessageError, TeacherError
from taid_ray.teacher.payload import PayloadFormat, check_output
from taid_ray.teacher.wire import digest, pack, unpack, verify
from tests.support.feeding import feed

ODD_NAMES = [
    "float99", "Tensor", "tensor", "", "__class__", "float32 ", "Float32", "float", "half", "double", "int8", "uint8", "int64",
    "bool", "complex64", "quint8", "bits8", "float8_e4m3fnuz", "float8_e5m2", "float4_e2m1fn_x2", "torch.float32", "\x00",
    "\ud800", "x" * 5000, None, 3, b"float32", ["float32"], torch.float32, np.str_("float32"),
]  # fmt: skip
ODD_NUMBERS = [
    -1,
    -2,
    0,
    1,
    2**31,
    2**40,
    2**62,
    2**63,
    2**64,
    10**400,
    2.0,
    0.5,
    float("nan"),
    float("inf"),
    True,
    None,
    "4",
]
ODD_NUMBERS += [np.int64(4), np.float32(4), [4], (4,), 4j, b"4"]
ODD_SHAPES = [None, "4", 4, [], [2, 4], {2: 4}, np.array([2, 4]), torch.Size([2, 4]), (1,) * 100, (0, 2**62), range(3)]
ODD_PARTS = [
    None,
    3,
    "abc",
    (),
    [],
    {},
    ("float32",),
    ("float32", (4,)),
    object(),
    float("nan"),
    torch.ones(2),
    np.zeros(4),
]
ODD_ARRAYS: list[Callable[[np.ndarray], Any]] = [
    lambda x: x[:-1], lambda x: x[::-1], lambda x: x[::2], lambda x: np.append(x, x), lambda x: x[None],
    lambda x: x.reshape(-1, 1), lambda x: np.insert(x, 0, 0)[1:], lambda x: x.view(np.int8), lambda x: x.astype(object),
    lambda x: x.astype(">u2"), lambda x: x.tobytes(), lambda x: x.tolist(), memoryview, np.ma.masked_array,
    lambda x: torch.tensor(x.tolist()),
]  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> tuple[PayloadFormat, int, dict[str, Any]]:
    """What a teacher sends, for some positions, of any kind and precision."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    expected = PayloadFormat(draw(st.sampled_from(get_args(Payload))), 6, 9, 3, dtype)
    positions = draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensors = {
        name: (4 * torch.randn(shape, generator=generator)).to(kind)
        for name, (shape, kind) in expected.shapes(positions).items()
    }
    if "ids" in tensors:
        tensors["ids"] = (
            torch.rand(positions, expected.vocabulary, generator=generator).argsort(1)[:, : expected.k].sort(1)[0].int()
        )
    return expected, positions, {name: pack(tensor) for name, tensor in tensors.items()}


@st.composite
def damaged(draw: st.DrawFn, answer: dict[str, Any]) -> Any:
    """The answer after up to three changes."""
    answer = dict(answer)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*answer, "hidden", "extra"]))
        how = draw(
            st.sampled_from(["part", "drop", "rename", "dtype", "shape", "size", "bytes", "bytes", "length", "array"])
        )
        packed = answer.get(name)
        if how == "part":
            answer[name] = draw(st.sampled_from(ODD_PARTS))
        elif how == "drop":
            answer.pop(name, None)
        elif how == "rename":
            answer[draw(st.sampled_from(["", "hidden", "ids", "values", "\ud800"]))] = answer.pop(name, None)
        elif type(packed) is tuple and len(packed) == 3 and type(packed[1]) is tuple and type(packed[2]) is np.ndarray:
            answer[name] = draw(changed(packed, how))
    return answer


@st.composite
def changed(draw: st.DrawFn, packed: tuple[Any, Any, Any], how: str) -> Any:
    """One packed tensor with its dtype, shape or bytes changed, or none of them (`length`: of the tuple)."""
    name, shape, data = packed
    if how == "dtype":
        name = draw(st.sampled_from(ODD_NAMES))
    elif how == "shape":
        sizes = st.lists(st.sampled_from(ODD_NUMBERS) | st.integers(0, 9), max_size=4).map(tuple)
        shape = draw(st.sampled_from([*ODD_SHAPES, shape[::-1], (*shape, 1), shape[:1]]) | sizes)
    elif how == "size" and shape:
        at = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:at], draw(st.sampled_from(ODD_NUMBERS)), *shape[at + 1 :])
    elif how == "bytes" and data.dtype == np.uint8 and data.size:
        data = data.copy()
        for _ in range(draw(st.integers(1, 3))):
            data.flat[draw(st.integers(0, data.size - 1))] = draw(
                st.sampled_from([0x7F, 0xFF, 0x80]) | st.integers(0, 255)
            )
    elif how == "array" and data.dtype == np.uint8:
        data = draw(st.sampled_from(ODD_ARRAYS))(data)
    return (
        (name, shape, data)
        if how != "length"
        else draw(st.sampled_from([(name, shape), (name, shape, data, data), [name, shape, data]]))
    )


def check_received(expected: PayloadFormat, positions: int, received: dict[str, Any]) -> bool:
    """Whether what was received is accepted; then it is what the format says, finite, and its bytes are those that came.

    What is refused raises MessageError in `unpack` (no tensor) or TeacherError in `check_output` (not the expected tensors).
    """
    try:
        tensors = {name: unpack(packed) for name, packed in received.items()}
        check_output(tensors, expected, positions)
    except (MessageError, TeacherError) as error:
        assert str(error) and len(str(error)) < 1000
        assert error.__cause__ is None
        return False
    shapes = expected.shapes(positions)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == shapes
    for name, tensor in tensors.items():
        assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == received[name][2].tobytes()
        if name == "ids":
            assert all(0 <= a < b < expected.vocabulary for row in tensor.tolist() for a, b in pairwise(row))
        values = tensor.double()
        assert not values.isnan().any() and not (values == float("inf")).any()
        assert name in ("logits", "log_tail") or values.isfinite().all()
    return True


def test_damaged_answers() -> None:
    """Without a look at the checksum, and with one: then nothing but the answer itself passes."""
    accepted = 0

    def check(value: tuple[tuple[PayloadFormat, int, dict[str, Any]], dict[str, Any]]) -> None:
        nonlocal accepted
        (expected, positions, sent), received = value
        assert check_received(expected, positions, sent)
        accepted += check_received(expected, positions, received)
        try:
            verify(received, digest(sent))
        except MessageError:
            return
        assert received.keys() == sent.keys()
        for name, (dtype, shape, data) in sent.items():
            assert received[name][:2] == (dtype, shape) and np.array_equal(received[name][2], data)

    both = answers().flatmap(lambda answer: st.tuples(st.just(answer), damaged(answer[2])))
    feed(both, 3200, check)
    assert accepted > 320


@pytest.mark.parametrize("received", [None, 3, [], {}, {3: pack(torch.ones(2))}, {None: 3}, {"hidden": None}])
def test_what_is_no_payload_has_no_checksum(received: Any) -> None:
    with pytest.raises(MessageError):
        verify(received, "0" * 16)
