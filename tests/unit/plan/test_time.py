"""Operations against torch's own counter; times and costs against numbers worked out by hand."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from taid_ray.config.models import LoraConfig
from taid_ray.errors import ConfigError
from taid_ray.models.adapters import add_lora
from taid_ray.models.head import hidden_states
from taid_ray.models.student_init import from_architecture
from taid_ray.plan.hardware import NAMES, Hardware, hardware_named
from taid_ray.plan.time import (
    BANDWIDTH_SHARE,
    LOSS_PASSES,
    OPTIMIZER_BYTES,
    Speed,
    StepWorkload,
    TokenFlops,
    backward_flops,
    body_flops,
    combined_times,
    estimate_cost,
    loss_flops,
    student_times,
    teacher_time,
)
from taid_ray.plan.trace import shape_of

CHIP = Hardware("chip", 1000.0, 100.0, 1e9, 1e4, 0.0)
LENGTH = 64
LLAMA = LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, dtype="float32",
)  # fmt: skip


def counted(attention: str, lora: LoraConfig | None = None) -> tuple[float, float]:
    """Operations per token of the body's forward and backward pass as torch counts them."""
    model = from_architecture(LLAMA, attention, 0)
    if lora:
        add_lora(model, lora, 0)
    inputs = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64), "position_ids": torch.arange(LENGTH)[None]}
    model.train()
    with FlopCounterMode(display=False) as counter:
        hidden = hidden_states(model, inputs)
        forward = counter.get_total_flops()
        hidden.sum().backward()
        return forward / LENGTH, (counter.get_total_flops() - forward) / LENGTH


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_operations_are_those_that_torch_counts(lora: LoraConfig | None) -> None:
    """Eager attention, because the counter does not know the fused one on a CPU; it computes the whole square.

    Behind adapters the first layer needs no gradient of its inputs, which is much in a model of two.
    """
    shape = shape_of(LLAMA, lora)
    arguments = (shape.layers, shape.attention_width, LENGTH, True)
    forward, backward = counted("eager", lora)
    assert body_flops(shape.matmul, *arguments) == pytest.approx(forward, rel=0.02)
    assert backward_flops(shape.matmul, shape.matmul_trained, *arguments) == pytest.approx(backward, rel=0.1)


def test_unpacked_rows_see_half_as_much() -> None:
    assert body_flops(0, 2, 8, 100, packed=True) == 2 * body_flops(0, 2, 8, 100, packed=False) == 4 * 2 * 8 * 100


def test_the_loss_has_both_heads() -> None:
    # forward, gradients of hidden states and head; the teacher's logits
    assert loss_flops(10, 3, 5, head_trained=True) == 2 * 10 * (3 * 3 + 5)
    assert loss_flops(10, 3, None, head_trained=False) == 2 * 10 * 2 * 3


def workload(**changes: Any) -> StepWorkload:
    values = {"rows": 8, "worker_rows": 4, "requests": 4, "length": 10, "vocabulary": 5, "trained_per_worker": 100.0}
    return StepWorkload(**(values | changes))


def test_the_students_time() -> None:
    flops = TokenFlops(teacher=0.0, forward=10.0, backward=20.0, recompute=10.0, loss=5.0)
    total, loss, optimizer = student_times(workload(), flops, Speed.of(CHIP, 2, dtype_bytes=2, use=0.5))
    bandwidth = 2e4 * BANDWIDTH_SHARE
    assert loss == pytest.approx(40 * (5 / 1000 + LOSS_PASSES * 4 * 5 / bandwidth))
    assert optimizer == pytest.approx(OPTIMIZER_BYTES * 100 / bandwidth)
    assert total == pytest.approx(40 * 40 / 1000 + loss + optimizer)
    slow, *_ = student_times(workload(), flops, Speed.of(CHIP, 2, dtype_bytes=4, use=0.5))
    assert slow > total


@pytest.mark.parametrize(
    ("weight_bytes", "seconds"), [(0.0, 80 * 30 / 500), (1e6, 4 * 2 * 1e6 / (1e4 * BANDWIDTH_SHARE))]
)
def test_the_teachers_time_is_computing_or_reading_weights(weight_bytes: float, seconds: float) -> None:
    flops = TokenFlops(teacher=30.0, forward=0.0, backward=0.0, recompute=0.0, loss=0.0)
    # 20 tokens a request and 10 a pass: two passes each
    assert teacher_time(workload(), flops, Speed.of(CHIP, 1, 2, 0.5), weight_bytes, max_tokens=10) == pytest.approx(
        seconds
    )


@pytest.mark.parametrize(
    ("mode", "replicas", "step_s", "chosen", "balanced"),
    [
        ("pool", (1, 1), 9.0, 1, 5),
        ("pool", (1, 4), 2.25, 4, 5),  # the pool follows the load up to its limit
        ("pool", (1, 9), 2.0, 5, 5),
        ("pool", (7, 9), 2.0, 7, 5),
        ("local", (1, 1), 2.0 + 9.0 / 3, 0, 0),  # one after the other, on a third of the rows
        ("cache", (1, 1), 2.0, 0, 0),
    ],
)
def test_steps_take_as_long_as_the_slower_side(
    mode: str, replicas: tuple[int, int], step_s: float, chosen: int, balanced: int
) -> None:
    times = combined_times((2.0, 0.5, 0.1), 9.0, mode, replicas, workers=3)
    assert (times.step_s, times.replicas, times.balanced_replicas) == (pytest.approx(step_s), chosen, balanced)
    assert times.bottleneck == ("student" if step_s == 2.0 else "teacher")


def test_the_cost() -> None:
    found = estimate_cost(800, workload(), 3600.0, processors=4, price_per_hour=2.5)
    assert (found.hours, found.processor_hours, found.cost) == (10, 40, 100)
    assert estimate_cost(800, workload(), 3600.0, 4, None).cost is None


def test_all_hardware_is_plausible() -> None:
    for name in NAMES:
        found = hardware_named(name)
        assert found.bfloat16_flops >= found.float32_flops > 0
        assert found.memory_bytes > found.reserved_bytes
        if not found.is_cpu:
            assert found.memory_bytes == float(name.rpartition("-")[2].removesuffix("g")) * 1e9


def test_unknown_hardware_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpu: unknown hardware 'h100' \(did you mean h100-80g\?\); choose one of"):
        hardware_named("h100")
