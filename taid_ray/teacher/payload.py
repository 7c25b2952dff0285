"""The five payloads, what a teacher sends per loss position: their encoding, their checks, and the loss target they give.

Shape letters: N loss positions, H the teacher's hidden size, V the shared vocabulary, k = teacher.topk.

| payload      | tensors                                                                             | carries           |
|--------------|-------------------------------------------------------------------------------------|-------------------|
| hidden       | hidden [N, H]                                                                       | everything        |
| hidden_int8  | values [N, H] int8, scale [N] float32                                               | values * scale    |
| hidden_fp8   | values [N, H] float8_e4m3fn, scale [N] float32                                      | values * scale    |
| topk         | log_probs [N, k] bfloat16, ids [N, k] int32, log_tail, label_log_probs [N] float32  | k + 1 buckets     |
| logits       | logits [N, V]                                                                       | everything        |

Tensors without a dtype here have the teacher's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from taid_ray.config.models import Payload
from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ConfigError, TeacherError
from taid_ray.losses.chunked import Target
from taid_ray.losses.projection import Projection
from taid_ray.losses.topk import TopK
from taid_ray.models.head import Head
from taid_ray.models.probes import not_finite
from taid_ray.models.vocabulary import Vocabulary

EXACT: tuple[Payload, ...] = ("hidden", "logits")
CHUNK_BYTES = 128 * 2**20
"""Bytes of float32 values that one chunk of positions may have in one tensor."""
QUANTIZED = {"hidden_int8": (torch.int8, 127.0), "hidden_fp8": (torch.float8_e4m3fn, 448.0)}
"""The dtype of a quantized payload, and the value that the largest magnitude of every position is scaled to."""


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's answer for the N loss positions of a batch."""

    kind: Payload
    tensors: dict[str, Tensor]
    """The payload's tensors by name, see this module's table."""
    compute_s: float = 0.0
    """Seconds the teacher computed."""
    image_bytes: int = 0
    """Bytes of images that were put into the object store for it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> "TeacherOutput":
        """Copies the output to a device, without waiting for tensors in pinned memory; no copy where it is there already."""
        return replace(self, tensors={name: x.to(device, non_blocking=True) for name, x in self.tensors.items()})

    def target(self, head: Head | None) -> Target:
        """Returns what the loss compares the student with.

        head: the teacher's, on the device of the tensors; used by the payloads that need it (`needs_head`).
        """
        tensors = self.tensors
        if self.kind == "logits":
            return Projection(tensors["logits"], None)
        if self.kind == "topk":
            return TopK(**tensors)
        assert head is not None, f"payload {self.kind} needs the teacher's head"
        if self.kind == "hidden":
            hidden = tensors["hidden"]
        else:
            hidden = dequantized(tensors["values"], tensors["scale"], head.weight.dtype)
        return Projection(hidden, head.weight, head.bias, head.transform)


def needs_head(kind: Payload) -> bool:
    """Returns whether the student's side must hold the teacher's head."""
    return kind not in ("topk", "logits")


def check_topk(k: int, vocabulary: int) -> None:
    """Raises ConfigError unless some shared ids stay outside the top-k."""
    if k >= vocabulary:
        raise ConfigError(
            f"teacher.topk = {k} must be below the {vocabulary} ids that teacher and student share; "
            "lower it, or set teacher.payload: hidden"
        )


def bytes_per_token(kind: Payload, hidden_size: int, vocabulary: int, k: int, dtype_bytes: int) -> int:
    """Counts the bytes of the answer for one loss position. dtype_bytes: of one value in the teacher's dtype."""
    columns = _columns(kind, hidden_size, vocabulary, k).values()
    return sum((width or 1) * (dtype_bytes if dtype is None else dtype.itemsize) for width, dtype in columns)


@dataclass(frozen=True)
class PayloadFormat:
    """Tensors, shapes and dtypes of one teacher's answers."""

    kind: Payload
    hidden_size: int
    vocabulary: int
    """Number of ids that teacher and student share."""
    k: int
    """Ids per position; used by topk only."""
    dtype: torch.dtype
    """Dtype of the teacher's hidden states and logits."""

    def shapes(self, num_positions: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns shape and dtype of every tensor of an answer."""
        columns = _columns(self.kind, self.hidden_size, self.vocabulary, self.k).items()
        return {
            name: ((num_positions,) if width is None else (num_positions, width), dtype or self.dtype)
            for name, (width, dtype) in columns
        }

    def empty(self, device: torch.device) -> TeacherOutput:
        """Returns the answer for no loss positions, on `device`."""
        shapes = self.shapes(0).items()
        return TeacherOutput(self.kind, {name: torch.empty(s, dtype=d, device=device) for name, (s, d) in shapes})


def check_output(tensors: Mapping[str, Tensor], expected: PayloadFormat, num_positions: int) -> None:
    """Raises TeacherError unless an answer has the right tensors, shapes and dtypes, and values that can be right.

    Those are finite, but -inf is a fine logit (an id the model excludes) and a fine log of an empty tail. The ids of topk
    ascend within the vocabulary: any other would be a read of foreign memory on a GPU.
    """
    shapes = expected.shapes(num_positions)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != shapes:
        raise TeacherError(
            f"the teacher answered a {expected.kind} request for {num_positions} positions with {_shown(found)} instead "
            f"of {_shown(shapes)}; run the same taid-ray and the same configuration on all machines"
        )
    for name, tensor in tensors.items():
        fine = _fine(tensor, lowest=name in ("logits", "log_tail"))
        if not bool(fine.all()):
            wrong = int((~fine.reshape(num_positions, -1)).any(-1).sum())
            raise TeacherError(
                f"the teacher's {name} (payload {expected.kind}) are not finite at {wrong} of {num_positions} positions: "
                f"{not_finite(expected.dtype, 'teacher')}"
            )
    if expected.kind == "topk":
        _check_ids(tensors["ids"], expected.vocabulary)


@torch.no_grad()
def encode(kind: Payload, hidden: Tensor, head: Head, labels: Tensor | None, k: int) -> dict[str, Tensor]:
    """Encodes hidden states [N, H] as the payload's tensors, in chunks of positions.

    head: cut to the shared rows, on the device of `hidden`; unused by the hidden payloads. labels [N]: needed by topk.
    Logits come from a matmul in the dtype of `hidden`, as the student would rebuild them, and are float32 from there on.
    """
    if kind == "hidden":
        return {"hidden": hidden}
    if kind in QUANTIZED:
        return _quantized(hidden, *QUANTIZED[kind])
    rows = chunk_rows(head.weight.shape[0])
    if kind == "logits":
        return {"logits": torch.cat([head.logits(part).to(hidden.dtype) for part in hidden.split(rows)])}
    assert labels is not None
    parts = [
        _topk(head.logits(part), chosen, k) for part, chosen in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def measured_error(kind: Payload, hidden: Tensor, head: Head, k: int) -> float:
    """Measures what a payload loses, averaged over the N positions of exact hidden states [N, H]; 0.0 for none.

    For topk the probability of all other ids. Otherwise KL(exact || carried) over the shared ids, in nats.
    """
    if kind in EXACT or not len(hidden):
        return 0.0
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part in hidden.split(chunk_rows(head.weight.shape[0])):
        tensors = encode(kind, part, head, torch.zeros(len(part), dtype=torch.int64, device=part.device), k)
        if kind == "topk":
            total += tensors["log_tail"].exp().sum()
        else:
            carried = dequantized(tensors["values"], tensors["scale"], part.dtype)
            total += _kl(head.logits(part), head.logits(carried)).sum()
    return float(total) / len(hidden)


@torch.no_grad()
def divergence(head: Head, hidden: Tensor, other: Tensor) -> Tensor:
    """Computes KL(p || q) in nats at each position, float64 [N], of p by hidden states `hidden` and q by `other`, [N, H]."""
    parts = zip(*(states.split(chunk_rows(head.weight.shape[0])) for states in (hidden, other)), strict=True)
    return torch.cat([_kl(head.logits(p), head.logits(q)) for p, q in parts])


def row_means(values: Tensor, loss_positions: Tensor, shape: torch.Size) -> list[float]:
    """Computes the mean of `values` [N], one per loss position, over each row; 0.0 for a row that has none.

    loss_positions: [N], into rows of `shape` [B, T] laid one behind the other.
    """
    rows, length = shape
    row, zeros = loss_positions // length, torch.zeros(rows, dtype=torch.float64)
    counts = zeros.index_add(0, row, torch.ones(len(row), dtype=torch.float64)).clamp(min=1)
    means: list[float] = (zeros.index_add(0, row, values.double().cpu()) / counts).tolist()
    return means


def dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes values [N, H] * scale [N] in float32, rounded once to dtype."""
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    for rows in _chunks(values):
        result[rows] = values[rows].float() * scale[rows, None]
    return result


def chunk_rows(width: int) -> int:
    """Counts the rows of a float32 tensor [rows, width] of at most CHUNK_BYTES; at least 1."""
    return max(1, CHUNK_BYTES // (4 * max(1, width)))


def _columns(
    kind: Payload, hidden_size: int, vocabulary: int, k: int
) -> dict[str, tuple[int | None, torch.dtype | None]]:
    """Maps a tensor's name to its width (None: one number per position) and dtype (None: the teacher's)."""
    if kind == "hidden":
        return {"hidden": (hidden_size, None)}
    if kind == "logits":
        return {"logits": (vocabulary, None)}
    if kind == "topk":
        single = (None, torch.float32)
        return {
            "log_probs": (k, torch.bfloat16), "ids": (k, torch.int32), "log_tail": single, "label_log_probs": single
        }  # fmt: skip
    return {"values": (hidden_size, QUANTIZED[kind][0]), "scale": (None, torch.float32)}


def _quantized(hidden: Tensor, dtype: torch.dtype, largest: float) -> dict[str, Tensor]:
    """Quantizes symmetrically: every position's largest magnitude becomes the dtype's, the others are rounded to nearest."""
    values = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    scale = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for rows in _chunks(hidden):
        exact = hidden[rows].float()
        # Never 0, so that a position of zeros only stays that.
        scale[rows] = (exact.abs().amax(-1) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        scaled = exact / scale[rows, None]
        values[rows] = scaled.round_() if dtype == torch.int8 else scaled
    return {"values": values, "scale": scale}


def _topk(logits: Tensor, labels: Tensor, k: int) -> dict[str, Tensor]:
    """Encodes float32 logits [n, V], which are overwritten, as payload topk; a position's ids ascend."""
    total = logits.logsumexp(-1)
    logits[~total.isfinite()] = (
        0.0  # such positions come out as not finite whatever is chosen, but NaN cannot be ordered
    )
    chosen = _largest(logits, k)
    ids = chosen.nonzero()[:, 1].view(-1, k)
    log_probs = logits.gather(1, ids) - total[:, None]
    label_log_probs = logits.gather(1, labels[:, None])[:, 0] - total
    # Over the other ids themselves: one minus the mass of the chosen would be rounding noise for a tail of 1e-9.
    log_tail = logits.masked_fill_(chosen, float("-inf")).logsumexp(-1) - total
    return {
        "log_probs": log_probs.bfloat16(), "ids": ids.int(), "log_tail": log_tail, "label_log_probs": label_log_probs
    }  # fmt: skip


def _largest(values: Tensor, k: int) -> Tensor:
    """Marks each row's k largest [n, V]; of equal ones (common in bfloat16) the first, on any device."""
    smallest = values.topk(k).values[:, -1:]
    above, equal = values > smallest, values == smallest
    wanted = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= wanted))


def _kl(exact_logits: Tensor, carried_logits: Tensor) -> Tensor:
    """Computes KL(exact || carried) of each row of float32 logits [n, V], in float64 [n]."""
    exact, carried = exact_logits.log_softmax(-1), carried_logits.log_softmax(-1)
    # An id the teacher excludes (-inf on both sides) adds nothing, where -inf - -inf would be NaN.
    terms = torch.where(exact == float("-inf"), 0.0, exact.exp() * (exact - carried))
    return terms.sum(-1).double()


def _fine(tensor: Tensor, lowest: bool) -> Tensor:
    """Marks where a tensor is finite or, if `lowest`, -inf."""
    if not tensor.is_floating_point():
        return torch.ones((), dtype=torch.bool)
    if tensor.dtype == torch.float8_e4m3fn:  # torch compares no float8; it has no infinities and two patterns of NaN
        return (tensor.view(torch.uint8) & 0x7F) != 0x7F
    return tensor < float("inf") if lowest else torch.isfinite(tensor)


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raises TeacherError unless ids [N, k] ascend within the vocabulary.

    Compared, not subtracted, because the difference of two damaged ones may not fit in an int32.
    """
    fine = (ids[:, 0] >= 0) & (ids[:, -1] < vocabulary) & (ids[:, 1:] > ids[:, :-1]).all(-1)
    if not bool(fine.all()):
        raise TeacherError(
            f"the teacher's ids (payload topk) do not ascend within 0 to {vocabulary - 1} at {int((~fine).sum())} of "
            f"{len(ids)} positions; run the same taid-ray and the same configuration on all machines"
        )


def _shown(columns: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)} {dtype}".replace("torch.", "") for name, (shape, dtype) in columns.items())


def _chunks(tensor: Tensor) -> Iterator[slice]:
    rows = chunk_rows(tensor.shape[1])
    return (slice(start, start + rows) for start in range(0, len(tensor), rows))


def payload_bytes_per_token(config: DistillConfig, teacher_config: Any, vocabulary: Vocabulary) -> int:
    """Counts the bytes of the teacher's answer for one loss position, from the configs of the run and of its model."""
    text, teacher = teacher_config.get_text_config(), config.given_teacher
    kept = teacher.dtype if teacher.dtype != "auto" else str(text.dtype).removeprefix("torch.")
    itemsize = 2 if kept in ("bfloat16", "float16") else 4
    return bytes_per_token(teacher.payload, text.hidden_size, vocabulary.num_shared, teacher.topk, itemsize)
