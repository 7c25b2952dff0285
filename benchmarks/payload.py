"""Payloads: the way through the object store, the cost of encoding and decoding, the bytes, and what is lost.

    python -m benchmarks.payload [MODEL TEXT_FILE]

The wire is the real one: a Ray actor packs hidden states and returns them, this process gets and unpacks them. What is
lost is measured on the bundled model and, if named, on another one (any causal language model with its tokenizer, and a
jsonl file with a column `text`), by the same code that a run calls at its start.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import ray
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import ROOT, local_ray, median, write
from taid_ray.config.data import DataSource
from taid_ray.config.models import Payload, TeacherConfig
from taid_ray.data.batch import Batch, collate
from taid_ray.data.dataset import validation_rows
from taid_ray.losses.projection import LogitTransform
from taid_ray.models.head import Head
from taid_ray.models.loading import load_tokenizer
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.payload import TeacherOutput, bytes_per_token, encode, needs_head
from taid_ray.teacher.wire import Packed, pack, unpack

KINDS: tuple[Payload, ...] = get_args(Payload)
HIDDEN_SIZE, VOCABULARY, TOPK = 5120, 152_064, 64  # Qwen2.5-32B
DTYPE = torch.bfloat16

WIRE_MIB = 64
ROUNDS, WARM_UP_ROUNDS = 15, 3
TARGET_SPEED_UP = 5.0

POSITIONS = {"hidden": 1024, "hidden_int8": 1024, "hidden_fp8": 1024, "topk": 128, "logits": 128}
"""Of the encoding benchmark: fewer where the head's matmul, 1.6 Gflop per position, would take minutes."""
REPEATS = 5

QUICKSTART = ROOT / "taid_ray" / "quickstart"
ERROR_ROWS, ROW_LENGTH = 64, 256


def main() -> None:
    wire = measure_wire()
    coding = measure_coding()
    sources = [(QUICKSTART / "stories260k", QUICKSTART / "tinystories_valid.jsonl")]
    if len(sys.argv) == 3:
        sources.append((Path(sys.argv[1]), Path(sys.argv[2])))
    errors = [measure_errors(model, text) for model, text in sources]
    sizes = {"hidden_size": HIDDEN_SIZE, "vocabulary": VOCABULARY, "topk": TOPK, "dtype": str(DTYPE)}
    write(
        "payload",
        {"wire": wire, "sizes": sizes, "coding": coding, "errors": errors},
        [wire_table(wire), coding_table(coding), *[error_table(error) for error in errors]],
    )


# --- (a) the wire


class Replica:
    """Holds hidden states and answers with them, packed as a teacher replica does, or as the torch tensor they are."""

    def __init__(self, rows: int):
        self._hidden = torch.randn(rows, HIDDEN_SIZE).to(DTYPE)

    def packed(self) -> Packed:
        return pack(self._hidden)

    def pickled(self) -> Tensor:
        return self._hidden


def measure_wire() -> dict[str, Any]:
    """Rounds of one answer each way, in turn. Both times end with the tensor at hand; `read` adds one pass over it."""
    rows = WIRE_MIB * 2**20 // (HIDDEN_SIZE * DTYPE.itemsize)
    seconds: dict[str, list[float]] = {name: [] for name in ("packed", "pickled", "packed_read", "pickled_read")}
    with local_ray(num_cpus=2, object_store_mib=1024):
        replica = ray.remote(num_cpus=1)(Replica).remote(rows)
        own = torch.empty(rows, HIDDEN_SIZE, dtype=DTYPE)
        for _ in range(WARM_UP_ROUNDS + ROUNDS):
            for name, ask, decode in (
                ("packed", replica.packed, unpack),
                ("pickled", replica.pickled, lambda tensor: tensor),
            ):
                start = time.perf_counter()
                hidden = decode(ray.get(ask.remote()))
                ready = time.perf_counter()
                own.copy_(hidden)  # as a copy to a GPU would read it
                seconds[name].append(ready - start)
                seconds[f"{name}_read"].append(time.perf_counter() - start)
                assert hidden.shape == own.shape
                del hidden
    speeds = {f"{name}_mib_per_s": WIRE_MIB / median(times[WARM_UP_ROUNDS:]) for name, times in seconds.items()}
    ratio, ratio_read = (
        median([b / a for a, b in zip(seconds[f"packed{end}"], seconds[f"pickled{end}"], strict=True)][WARM_UP_ROUNDS:])
        for end in ("", "_read")
    )
    target = {"speed_up": TARGET_SPEED_UP, "met": ratio >= TARGET_SPEED_UP}
    return {
        "mib": WIRE_MIB,
        "rounds": ROUNDS,
        **speeds,
        "speed_up": ratio,
        "speed_up_read": ratio_read,
        "target": target,
    }


# --- (b) encoding and decoding


def measure_coding() -> list[dict[str, Any]]:
    """Seconds per position from hidden states to bytes (encode, pack) and from bytes to the loss's target."""
    head = Head(torch.empty(VOCABULARY, HIDDEN_SIZE, dtype=DTYPE).normal_(std=0.02), None, LogitTransform())
    most = max(POSITIONS.values())
    hidden, labels = torch.randn(most, HIDDEN_SIZE).to(DTYPE), torch.randint(0, VOCABULARY, (most,))
    return [_coding(kind, hidden[: POSITIONS[kind]], head, labels[: POSITIONS[kind]]) for kind in KINDS]


def _coding(kind: Payload, hidden: Tensor, head: Head, labels: Tensor) -> dict[str, Any]:
    def sent() -> dict[str, Packed]:
        return {name: pack(tensor) for name, tensor in encode(kind, hidden, head, labels, TOPK).items()}

    answer = sent()

    def received() -> Any:
        return TeacherOutput(kind, {name: unpack(packed) for name, packed in answer.items()}).target(head)

    def multiplied() -> Any:
        return None if needs_head(kind) else head.logits(hidden)

    encoding, decoding, matmul = _seconds(sent, received, multiplied)
    positions = len(hidden)
    return {
        "payload": kind,
        "positions": positions,
        "bytes_per_token": bytes_per_token(kind, HIDDEN_SIZE, VOCABULARY, TOPK, DTYPE.itemsize),
        "encode_us_per_position": 1e6 * encoding / positions,
        "of_which_matmul_us": 1e6 * matmul / positions,
        "decode_us_per_position": 1e6 * decoding / positions,
    }


def _seconds(*functions: Callable[[], Any]) -> list[float]:
    """Median of REPEATS calls of each, in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return [median(own) for own in times]


# --- (c) what is lost


def measure_errors(model: Path, text: Path) -> dict[str, Any]:
    """Payload errors as a run measures them, on validation rows of `text`; top-k for k that the vocabulary allows."""
    tokenizer = load_tokenizer(TeacherConfig(model=str(model)))
    data = DataSource(train=str(text), valid=str(text), sequence_length=ROW_LENGTH)
    batch = collate(validation_rows(data, tokenizer)[:ERROR_ROWS])
    found: dict[str, float] = {}
    for kind in KINDS:
        for k in (16, 64, 256) if kind == "topk" else (TOPK,):
            if k < len(tokenizer):
                found[f"topk {k}" if kind == "topk" else kind] = _error(model, len(tokenizer), kind, k, batch)
    return {"model": model.name, "text": text.name, "positions": batch.num_loss_tokens, "errors": found}


def _error(model: Path, vocabulary: int, kind: Payload, k: int, batch: Batch) -> float:
    config = TeacherConfig(model=str(model), mode="local", payload=kind, topk=k)
    return LocalTeacher(config, vocabulary, torch.device("cpu")).payload_error(batch)


# --- tables


def wire_table(wire: dict[str, Any]) -> Table:
    met = "met" if wire["target"]["met"] else "NOT met"
    table = Table(
        title=f"{WIRE_MIB} MiB of hidden states from a Ray actor to this process, median of {ROUNDS} alternating rounds "
        f"(target {TARGET_SPEED_UP:g}x: {met})"
    )
    for column in ("", "packed, MiB/s", "pickled torch tensor, MiB/s", "speed-up"):
        table.add_column(column, justify="right" if column else "left")
    for row, end in (("until the tensor is at hand", ""), ("and once copied from there", "_read")):
        speeds = [f"{wire[f'{name}{end}_mib_per_s']:,.0f}" for name in ("packed", "pickled")]
        table.add_row(row, *speeds, f"{wire[f'speed_up{end}']:.1f}x")
    return table


def coding_table(coding: list[dict[str, Any]]) -> Table:
    exact = next(row for row in coding if row["payload"] == "hidden")["bytes_per_token"]
    table = Table(
        title=f"At Qwen2.5-32B sizes (hidden size {HIDDEN_SIZE:,}, {VOCABULARY:,} ids, bfloat16, top {TOPK}); "
        f"median of {REPEATS}"
    )
    for column in (
        "payload", "bytes per loss token", "of hidden", "encode + pack, us", "of which head matmul", "unpack + decode, us",
        "positions",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "payload" else "right")
    for row in coding:
        table.add_row(
            row["payload"],
            f"{row['bytes_per_token']:,}",
            f"{row['bytes_per_token'] / exact:.3g}x",
            f"{row['encode_us_per_position']:,.1f}",
            f"{row['of_which_matmul_us']:,.1f}",
            f"{row['decode_us_per_position']:,.2f}",
            str(row["positions"]),
        )
    return table


def error_table(found: dict[str, Any]) -> Table:
    table = Table(title=f"What is lost: {found['model']} on {found['positions']:,} positions of {found['text']}")
    for column in ("payload", "mean KL(exact || carried)", "mean mass outside the top k"):
        table.add_column(column, justify="left" if column == "payload" else "right")
    for name, error in found["errors"].items():
        figure = f"{error:.2e}" if error else "0"
        table.add_row(name, *(("", figure) if name.startswith("topk") else (figure, "")))
    return table


if __name__ == "__main__":
    main()
