"""The chunked loss against the published formula: time, memory, and that both give the same loss and gradients.

    python -m benchmarks.loss

Both go from hidden states and output heads to the gradients of the student's hidden states and head. On a GPU the sizes
are those of Qwen2.5-32B -> 1.5B in bfloat16, and Liger's chunked JSD takes part where it can be imported.
"""

import gc
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import PeakMemory, in_fresh_process, machine, median, write
from taid_ray.distributed.device import loss_memory_mib
from taid_ray.losses.chunked import chunk_tokens_for, chunked_loss
from taid_ray.losses.objective import Objective
from taid_ray.losses.projection import Projection

T = 0.4
"""The interpolation."""
LOGIT_SCALE = 2.0
"""Standard deviation of the logits."""
FORMULA_TENSORS = 7
"""Float32 [tokens, V] tensors that the published formula was seen to keep alive, rounded up; it runs only if they fit."""


@dataclass(frozen=True)
class Size:
    vocabulary: int
    tokens: int
    """Loss positions."""
    rounds: int
    """Timed ones."""
    student_hidden: int = 256
    teacher_hidden: int = 512
    dtype: str = "float32"
    device: str = "cpu"


CPU_SIZES = [Size(v, tokens, rounds) for v in (32_000, 152_064) for tokens, rounds in ((1024, 7), (4096, 3))]
GPU_SIZES = [Size(152_064, 8192, 7, 1536, 5120, "bfloat16", "cuda")]
# Of time and memory, relative to the published formula; the one for memory holds at a vocabulary of 152k.
CPU_TARGETS, GPU_TARGETS = (0.85, 1 / 10), (0.7, 1 / 8)


class Inputs:
    def __init__(self, size: Size) -> None:
        generator = torch.Generator(size.device).manual_seed(0)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, device=size.device)
            return x.mul_(scale).to(getattr(torch, size.dtype))

        self.hidden = randn(size.tokens, size.student_hidden).requires_grad_()
        self.head = randn(size.vocabulary, size.student_hidden, scale=LOGIT_SCALE / size.student_hidden**0.5)
        self.head.requires_grad_()
        self.teacher_hidden = randn(size.tokens, size.teacher_hidden)
        self.teacher_head = randn(size.vocabulary, size.teacher_hidden, scale=LOGIT_SCALE / size.teacher_hidden**0.5)
        self.labels = torch.randint(size.vocabulary, (size.tokens,), generator=generator, device=size.device)

    def forget_gradients(self) -> None:
        self.hidden.grad = self.head.grad = None


def published(x: Inputs) -> Tensor:
    """src/distil_losses/taid.py and fkl.py of the reference, with the matmuls that make its logits."""
    mask = torch.ones(len(x.labels), device=x.labels.device)
    logits = x.hidden @ x.head.T
    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_head.T
    p_t = torch.softmax((1 - T) * logits.detach() + T * teacher_logits, dim=-1, dtype=torch.float32)
    log_q = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    products = torch.masked_fill(p_t * log_q, torch.isinf(logits), 0)
    loss = -torch.sum(torch.sum(products, dim=-1) * mask) / torch.sum(mask)
    loss.backward()
    return loss.detach()


def chunked(x: Inputs, name: str = "taid") -> Tensor:
    """As a training step calls it, with all parts of the loss. Returns the cross-entropy form, as the reference does."""
    vocabulary = len(x.head)
    loss, parts = chunked_loss(
        Objective(name, torch.tensor(T)),
        Projection(x.hidden, x.head),
        Projection(x.teacher_hidden, x.teacher_head),
        x.labels,
        chunk_tokens=chunk_tokens_for(vocabulary, loss_memory_mib(x.hidden.device) * 2**20),
    )
    (loss / len(x.labels)).backward()
    return (parts.kl + parts.entropy) / parts.tokens


def chunked_jsd(x: Inputs) -> Tensor:
    """What Liger's loss is to be compared with: the same divergence (of another weight, which costs the same)."""
    return chunked(x, "js")


def liger_jsd(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
    loss: Tensor = loss_function(x.hidden, x.head, x.teacher_hidden, x.teacher_head, x.labels, None, None)
    loss.backward()
    return loss.detach()


Variant = Callable[[Inputs], Tensor]
VARIANTS: dict[str, Variant] = {
    "published": published,
    "chunked": chunked,
    "chunked_jsd": chunked_jsd,
    "liger_jsd": liger_jsd,
}


def main() -> None:
    on_gpu = torch.cuda.is_available()
    names = ["published", "chunked"]
    if on_gpu and find_spec("liger_kernel"):
        names += ["chunked_jsd", "liger_jsd"]
    targets = GPU_TARGETS if on_gpu else CPU_TARGETS
    rows = [measure(size, names, targets) for size in (GPU_SIZES if on_gpu else CPU_SIZES)]
    device = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower() if on_gpu else ""
    notes = {"t": T, "logit_scale": LOGIT_SCALE, "targets": dict(zip(("time", "memory_at_152k"), targets, strict=True))}
    write(f"loss_{device}" if on_gpu else "loss", {**notes, "rows": rows}, [table(rows, names)])


def measure(size: Size, names: list[str], targets: tuple[float, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"size": asdict(size), "memory_mib": loss_memory_mib(torch.device(size.device))}
    needed, free = 4 * FORMULA_TENSORS * size.vocabulary * size.tokens, free_bytes(size.device)
    if needed > free:
        row["skipped"] = f"the published formula needs about {needed / 2**30:.1f} GiB, free are {free / 2**30:.1f}"
        names = [name for name in names if name != "published"]
    variants = {name: VARIANTS[name] for name in names}
    row["peak_mib"] = {name: in_fresh_process(peak_bytes, size, each) / 2**20 for name, each in variants.items()}
    row |= in_fresh_process(compare, size, variants, ("chunked", "published"))
    if "published" in names:
        seconds, peak = row["seconds"], row["peak_mib"]
        row["time_ratio"] = seconds["chunked"] / seconds["published"]
        row["memory_ratio"] = peak["chunked"] / peak["published"]
        row["time_met"] = row["time_ratio"] <= targets[0]
        row["memory_met"] = size.vocabulary < 152_000 or row["memory_ratio"] <= targets[1]
    return row


def peak_bytes(size: Size, variant: Variant) -> int:
    """The most memory that one loss with its gradients took beyond its inputs."""
    warm_up(size, [variant])
    x = Inputs(size)
    if size.device == "cpu":
        with PeakMemory() as memory:
            variant(x)
        return memory.bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant(x)
    return torch.cuda.max_memory_allocated() - before


def compare(size: Size, variants: dict[str, Variant], pair: tuple[str, str]) -> dict[str, Any]:
    """Median seconds of alternating rounds, and how far the first variant of `pair` is from the second."""
    warm_up(size, list(variants.values()))
    x = Inputs(size)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    results: dict[str, list[Tensor]] = {}
    for _ in range(size.rounds):
        for name, variant in variants.items():
            x.forget_gradients()
            synchronize(size)
            start = time.perf_counter()
            loss = variant(x)
            synchronize(size)
            seconds[name].append(time.perf_counter() - start)
            if name in pair and name not in results:
                assert x.hidden.grad is not None and x.head.grad is not None
                results[name] = [loss.clone(), x.hidden.grad.clone(), x.head.grad.clone()]
    found: dict[str, Any] = {"seconds": {name: median(values) for name, values in seconds.items()}}
    found["all_seconds"] = seconds
    if len(results) == 2:
        errors = map(relative_difference, *(results[name] for name in pair))
        found["differences"] = dict(zip(("loss", "hidden_gradient", "head_gradient"), errors, strict=True))
    return found


def warm_up(size: Size, variants: list[Variant]) -> None:
    """Loads what the first call loads (and compiles, in Liger's case)."""
    tokens = 64 if size.device == "cpu" else size.tokens
    few = Inputs(Size(**asdict(size) | {"tokens": tokens}))
    for variant in variants:
        few.forget_gradients()
        variant(few)
    synchronize(size)
    del few
    gc.collect()


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def synchronize(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def table(rows: list[dict[str, Any]], names: list[str]) -> Table:
    first = Size(**rows[0]["size"])
    facts = f"H {first.student_hidden} and {first.teacher_hidden}, {first.dtype}, {machine()['device']}"
    shown = Table(title=f"loss, from hidden states to gradients ({facts})")
    for column in ("V", "tokens", *names, "time ratio", "memory ratio", "largest relative difference"):
        shown.add_column(column, justify="right")
    for row in rows:
        size = row["size"]
        cells = [
            f"{row['seconds'][name]:.2f} s, {row['peak_mib'][name]:,.0f} MiB" if name in row["seconds"] else "skipped"
            for name in names
        ]
        if "skipped" in row:
            cells += ["-", "-", row["skipped"]]
        else:
            differences = ", ".join(f"{name} {value:.0e}" for name, value in row["differences"].items())
            cells += [verdict(row["time_ratio"], row["time_met"]), verdict(row["memory_ratio"], row["memory_met"])]
            cells.append(differences)
        shown.add_row(f"{size['vocabulary']:,}", f"{size['tokens']:,}", *cells)
    return shown


def verdict(ratio: float, met: bool) -> str:
    return f"{ratio:.3f}" + ("" if met else " (target missed)")


if __name__ == "__main__":
    main()
