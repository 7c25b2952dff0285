"""Every other loss in chunks against its plain form, logits of all tokens and autograd: time, memory, and the same result.

    python -m benchmarks.losses                 # all of them
    python -m benchmarks.losses dkd ctkd        # some

Both go from hidden states and output heads to the gradients of the student's hidden states and head, and of a temperature
that learns.
"""

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import in_fresh_process, machine, write
from benchmarks.loss import Inputs, Size, T, compare, peak_bytes, verdict
from taid_ray import losses
from taid_ray.distributed.device import loss_memory_mib
from taid_ray.losses.closed_form import CLOSED_FORM
from taid_ray.losses.objective import Objective
from taid_ray.losses.projection import Projection

TEMPERATURES = {"dkd": 4.0, "ctkd": 15.6}
"""Those with which a loss begins; 1 for the others."""
NAMES = (
    "adaptive_kl",
    "dkd",
    "ctkd",
    "gkd",
    "taid_reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "reverse_kl",
    "js",
    "tvd",
)
SIZE = Size(152_064, 1024, 3)
TIME_TARGET, MEMORY_TARGETS = 1.0, {True: 1 / 8, False: 1 / 4}
"""At most, of the plain form's. Memory: with a gradient in closed form, and by autograd."""


def temperature_of(name: str) -> Tensor:
    return torch.tensor(TEMPERATURES.get(name, 1.0), requires_grad=name == "ctkd")


def plain(x: Inputs, name: str) -> Tensor:
    """The function of taid_ray.losses on whole matrices."""
    logits = x.hidden @ x.head.T
    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_head.T
    function, temperature = getattr(losses, name), temperature_of(name)
    if name == "dkd":
        values = function(logits, teacher_logits, x.labels, temperature=float(temperature))
    elif name == "ctkd":
        values = function(logits, teacher_logits, temperature)
    else:
        values = function(logits, teacher_logits, *([T] if name == "taid_reverse_kl" else []))
    loss: Tensor = values.mean()
    loss.backward()
    return loss.detach()


def chunked(x: Inputs, name: str) -> Tensor:
    """As a training step calls it, but for the cross-entropy on the labels that it also reports."""
    temperature = temperature_of(name)
    known = temperature if temperature.requires_grad else float(temperature)
    objective = Objective(name, torch.tensor(T), temperature=known, squared=name in TEMPERATURES)
    memory = loss_memory_mib(x.hidden.device) * 2**20
    loss, parts = losses.chunked_loss(
        objective,
        Projection(x.hidden, x.head),
        Projection(x.teacher_hidden, x.teacher_head),
        x.labels if name == "dkd" else None,  # as the plain form, which has no cross-entropy on them either
        chunk_tokens=losses.chunk_tokens_for(len(x.head), memory),
    )
    (loss / len(x.labels)).backward()
    return parts.kl / parts.tokens


def measure(size: Size, name: str) -> dict[str, Any]:
    variants = {"plain": partial(plain, name=name), "chunked": partial(chunked, name=name)}
    row: dict[str, Any] = {"loss": name, "closed_form": name in CLOSED_FORM, "size": asdict(size)}
    row["peak_mib"] = {form: in_fresh_process(peak_bytes, size, each) / 2**20 for form, each in variants.items()}
    row |= in_fresh_process(compare, size, variants, ("chunked", "plain"))
    seconds, peak = row["seconds"], row["peak_mib"]
    row["time_ratio"], row["memory_ratio"] = (x["chunked"] / x["plain"] for x in (seconds, peak))
    row["time_met"] = row["time_ratio"] <= TIME_TARGET
    row["memory_met"] = row["memory_ratio"] <= MEMORY_TARGETS[row["closed_form"]]
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    size = Size(**rows[0]["size"])
    facts = f"{size.tokens:,} tokens, {size.vocabulary:,} ids, {machine()['device']}"
    shown = Table(title=f"losses, from hidden states to gradients ({facts})")
    for column in ("loss", "plain", "chunked", "time ratio", "memory ratio", "largest relative difference"):
        shown.add_column(column, justify="left" if column == "loss" else "right")
    for row in rows:
        cells = [f"{row['seconds'][form]:.2f} s, {row['peak_mib'][form]:,.0f} MiB" for form in ("plain", "chunked")]
        cells += [verdict(row[f"{kind}_ratio"], row[f"{kind}_met"]) for kind in ("time", "memory")]
        differences = ", ".join(f"{what} {value:.0e}" for what, value in row["differences"].items())
        shown.add_row(row["loss"], *cells, differences)
    return shown


def main() -> None:
    names = sys.argv[1:] or list(NAMES)
    rows = []
    for name in names:
        rows.append(measure(SIZE, name))
        print(f"{name}: time {rows[-1]['time_ratio']:.2f}, memory {rows[-1]['memory_ratio']:.3f}", flush=True)
    targets = {"time": TIME_TARGET, "memory": MEMORY_TARGETS[True], "memory_by_autograd": MEMORY_TARGETS[False]}
    notes = {"t": T, "temperatures": TEMPERATURES, "targets": targets}
    write("losses" if names == list(NAMES) else "losses_some", {**notes, "rows": rows}, [table(rows)])


if __name__ == "__main__":
    main()
