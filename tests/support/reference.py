"""The same training written plainly: one process, whole batches, logits of the full vocabulary, torch and nothing else.

Shares with the product the data order and the initial weights, which other tests are about. Everything that the
trajectory tests are about (loss, normalisation, clipping, optimizer, schedule) is written again here from the formulas.
"""

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taid_ray import losses
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.data.dataset import TrainingData
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.pair import run_tokenizer
from taid_ray.models.student_init import build_student
from tests.support.store import prepare_here


def global_batches(config: DistillConfig) -> Iterator[list[Row]]:
    """The rows of one global batch after another."""
    seed, batch_size = config.train.seed, config.train.batch_size
    if config.data.order == "global":
        reader = prepare_here(config).reader(seed, batch_size)
        yield from (reader.read(step, 0, 1).rows for step in count())
    data = TrainingData(config.data.sources[0], run_tokenizer(config), seed, batch_size)
    yield from (rows for rows, _ in data.batches())


def target_and_kl(
    config: DistillConfig, position: tuple[Tensor, Tensor, Tensor], t: float, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """The target [N, V], and the sum of the divergence over the positions of a row.

    position: logits of student and teacher, and labels. TAID and CTKD are written out here; the others are the functions that
    tests/golden is about.
    """
    z, tau, labels = position
    loss = config.loss
    mixed = (1 - t) * z.detach() + t * tau
    target = torch.softmax(mixed / temperature, -1)
    if loss.name in ("taid", "ctkd"):
        kl = (target * (target.log() - torch.log_softmax(z / temperature, -1))).sum()
        return target.detach(), kl * temperature**2 if loss.squares_temperature else kl
    others: dict[str, tuple[Tensor | float, ...]] = {"taid_reverse_kl": (t,), "dkd": (labels,)}
    function, fixed = getattr(losses, loss.name), float(temperature)
    values = function(z, tau, *others.get(loss.name, ()), **loss.settings, temperature=fixed)
    factor = fixed**2 if loss.squares_temperature and loss.name != "dkd" else 1.0
    return target, factor * values.sum()


def whole_row(row: Row) -> Iterator[tuple[dict[str, Tensor], NDArray[np.int64]]]:
    """The model inputs of a row of text, and its targets."""
    yield {name: torch.tensor(getattr(row, name)[None]) for name in ("input_ids", "position_ids")}, row.targets


def reference_run(
    config: DistillConfig,
    documents: Callable[[Row], Iterator[tuple[dict[str, Tensor], NDArray[np.int64]]]] = whole_row,
) -> list[dict[str, Any]]:
    """Per optimizer step: loss (cross-entropy form), grad_norm, tokens, and but for sft t, kl and temperature; `sources` has
    loss, kl and tokens of each source.

    TAID's schedule must be the adaptive one. documents: makes the model inputs of a row's parts, with their targets.
    """
    sft = config.loss.name == "sft"
    assert config.schedule.mode == "adaptive" and config.train.steps
    train, schedule = config.train, config.effective_schedule
    student = build_student(config, None).train()
    teacher = None if sft else load_causal_lm(config.given_teacher, dtype="float32", images=config.data.has_images)
    decayed = [p for p in student.parameters() if p.dim() >= 2]
    others = [p for p in student.parameters() if p.dim() < 2]
    theta = torch.ones(1, requires_grad=True)
    learned = config.loss.learned_temperature
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [*groups, *([{"params": [theta], "weight_decay": 0.0}] if learned else [])],
        betas=train.betas,
        eps=train.epsilon,
    )
    data = global_batches(config)
    t, momentum, previous = schedule.t_start, 0.0, None
    history = []
    for n in range(train.steps):
        rows = next(data)
        cross_entropy = entropy = torch.zeros((), dtype=torch.float64)
        tokens = sum(int(target) != NO_LABEL for row in rows for target in row.targets)
        parts = [[0.0, 0.0, 0] for _ in config.data.sources]
        optimizer.zero_grad()
        for row, (inputs, targets) in ((each, part) for each in rows for part in documents(each)):
            chosen = torch.tensor(targets) != NO_LABEL
            student_logits = student(**inputs, use_cache=False).logits[0, chosen]
            labels = torch.tensor(targets)[chosen]
            temperature = torch.tensor(config.loss.fixed_temperature)
            if learned:
                span = learned.max_temperature - learned.min_temperature
                temperature = learned.min_temperature + span * theta.sigmoid().squeeze()
            if teacher is None:
                kl, own_entropy = torch.nn.functional.cross_entropy(student_logits, labels, reduction="sum"), 0.0
            else:
                with torch.no_grad():
                    teacher_logits = teacher(**inputs, use_cache=False).logits[0, chosen]
                target, kl = target_and_kl(config, (student_logits, teacher_logits, labels), t, temperature)
                own_entropy = -float((target * target.log()).sum()) if config.loss.name == "taid" else 0.0
            everything = train.batch_size * config.data.sequence_length  # what published DKD divides by
            (kl / (everything if config.loss.published else tokens)).backward()
            cross_entropy = cross_entropy + kl.detach().double() + own_entropy
            entropy = entropy + own_entropy
            part = parts[row.source]
            parts[row.source] = [
                part[0] + float(kl.detach()) + own_entropy,
                part[1] + own_entropy,
                part[2] + int(chosen.sum()),
            ]
        if learned:
            assert theta.grad is not None
            ramp = min(1.0, (n + 1) / (learned.ramp * train.steps))
            theta.grad *= -(1 - math.cos(math.pi * ramp)) / 2
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:  # of a vision tower in a step without images: it decays as any other
            if parameter.grad is None and parameter in optimizer.state:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm or math.inf)
        warm = min(1.0, (n + 1) / train.warmup_steps) if train.warmup_steps else 1.0
        done = max(0, n - train.warmup_steps) / (train.steps - train.warmup_steps)
        for group in optimizer.param_groups:
            highest = learned.learning_rate if learned and group["params"][0] is theta else train.learning_rate
            group["lr"] = highest * warm * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()

        j = float(cross_entropy) / tokens
        sources = [
            {"loss": whole / max(own, 1), "kl": (whole - least) / max(own, 1), "tokens": own}
            for whole, least, own in parts
        ]
        compared = {} if sft else {"t": t, "kl": j - float(entropy) / tokens, "temperature": temperature.item()}
        history.append(compared | {"loss": j, "grad_norm": float(norm), "tokens": tokens, "sources": sources})
        if previous is not None and config.loss.is_taid:
            momentum = schedule.beta * momentum + (1 - schedule.beta) * (previous - j) / (previous + 1e-15)
            step = schedule.alpha / (1 + math.exp(-momentum)) * (1 - t)
            floor = schedule.t_start + (schedule.t_end - schedule.t_start) * n / train.steps
            t = min(schedule.t_end, max(floor, t + step))
        previous = j
    return history
