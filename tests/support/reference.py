"""The same training written plainly: one process, whole batches, logits of the full vocabulary, torch and nothing else.

Shares with the product the data order and the initial weights, which other tests are about. Everything that the
trajectory tests are about (loss, normalisation, clipping, optimizer, schedule) is written again here from the formulas.
"""

import math
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch

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


def reference_run(config: DistillConfig) -> list[dict[str, Any]]:
    """Per optimizer step: loss (cross-entropy form), grad_norm, tokens, and but for sft t and kl; `sources` has loss, kl and
    tokens of each source.

    TAID with the adaptive schedule, and sft, only.
    """
    sft = config.loss.name == "sft"
    assert (sft or config.loss.name == "taid") and config.schedule.mode == "adaptive" and config.train.steps
    train, schedule = config.train, config.schedule
    student = build_student(config, None).train()
    teacher = None if sft else load_causal_lm(config.given_teacher, dtype="float32")
    decayed = [p for p in student.parameters() if p.dim() >= 2]
    others = [p for p in student.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
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
        for row in rows:
            inputs = {name: torch.tensor(getattr(row, name)[None]) for name in ("input_ids", "position_ids")}
            chosen = torch.tensor(row.targets) != NO_LABEL
            student_logits = student(**inputs, use_cache=False).logits[0, chosen]
            if teacher is None:
                labels = torch.tensor(row.targets)[chosen]
                target = torch.nn.functional.one_hot(labels, student_logits.shape[-1]).double()
            else:
                with torch.no_grad():
                    teacher_logits = teacher(**inputs, use_cache=False).logits[0, chosen]
                target = torch.softmax((1 - t) * student_logits.detach() + t * teacher_logits, -1)
            loss = -(target * torch.log_softmax(student_logits, -1)).sum()
            (loss / tokens).backward()
            cross_entropy = cross_entropy + loss.detach().double()
            own_entropy = -torch.xlogy(target, target).sum().double()
            entropy = entropy + own_entropy
            part = parts[row.source]
            parts[row.source] = [
                part[0] + float(loss.detach()),
                part[1] + float(own_entropy),
                part[2] + int(chosen.sum()),
            ]
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), train.max_grad_norm or math.inf)
        warm = min(1.0, (n + 1) / train.warmup_steps) if train.warmup_steps else 1.0
        done = max(0, n - train.warmup_steps) / (train.steps - train.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()

        j = float(cross_entropy) / tokens
        sources = [
            {"loss": whole / max(own, 1), "kl": (whole - least) / max(own, 1), "tokens": own}
            for whole, least, own in parts
        ]
        compared = {} if sft else {"t": t, "kl": j - float(entropy) / tokens}
        history.append(compared | {"loss": j, "grad_norm": float(norm), "tokens": tokens, "sources": sources})
        if previous is not None:
            momentum = schedule.beta * momentum + (1 - schedule.beta) * (previous - j) / (previous + 1e-15)
            step = schedule.alpha / (1 + math.exp(-momentum)) * (1 - t)
            floor = schedule.t_start + (schedule.t_end - schedule.t_start) * n / train.steps
            t = min(schedule.t_end, max(floor, t + step))
        previous = j
    return history
