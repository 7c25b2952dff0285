"""A plain training loop in one process, with the logits of all positions or with taid-ray's chunked loss."""

import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step_case import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Case, Outcome, Watched, batches
from taid_ray.data.batch import Batch
from taid_ray.distributed.device import loss_memory_mib
from taid_ray.losses.chunked import chunk_tokens_for, chunked_loss
from taid_ray.losses.objective import Objective
from taid_ray.losses.projection import Projection
from taid_ray.models.head import hidden_states


def train_plain(case: Case, chunked: bool) -> Outcome:
    """Takes the steps of the case with torch and transformers alone."""
    from transformers import AutoModelForCausalLM

    loss_of = chunked_form if chunked else logits_form
    teacher = AutoModelForCausalLM.from_pretrained(case.teacher).eval().requires_grad_(False)
    student = AutoModelForCausalLM.from_pretrained(case.student).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    data = batches(case)
    make_resident(teacher, student)
    process, losses = Watched(), []
    times = [(time.perf_counter(), process.cpu_s())]
    for batch in data:
        loss = loss_of(student, teacher, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        times.append((time.perf_counter(), process.cpu_s()))
    return outcome_of(process, times, losses[0])


def logits_form(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """KL(teacher || student), mean over the loss positions: all but the last of each row."""
    with torch.no_grad():
        teacher_logits = teacher(**batch.inputs, use_cache=False).logits[:, :-1]
    student_logits = student(**batch.inputs, use_cache=False).logits[:, :-1]
    log_q, log_p = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / batch.num_loss_tokens


def chunked_form(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """The same from hidden states, with the chunk size that taid-ray chooses on a CPU."""
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, batch.inputs).flatten(0, 1)[batch.loss_positions]
    student_hidden = hidden_states(student, batch.inputs).flatten(0, 1)[batch.loss_positions]
    head = student.lm_head.weight
    total, _ = chunked_loss(
        Objective("forward_kl", torch.ones(())),
        Projection(student_hidden, head),
        Projection(teacher_hidden, teacher.lm_head.weight),
        chunk_tokens=chunk_tokens_for(len(head), loss_memory_mib(head.device) * 2**20),
    )
    return total / batch.num_loss_tokens


def make_resident(*models: nn.Module) -> None:
    """Reads all weights: they are mapped from their files, and would count as memory of the first step."""
    for model in models:
        for parameter in model.parameters():
            parameter.detach().sum()


def outcome_of(process: Watched, times: list[tuple[float, float]], first_loss: float) -> Outcome:
    """times: wall and CPU clock before the first step and after each."""
    walls, cpus = zip(*times, strict=True)
    return Outcome(
        step_s=[after - before for before, after in pairwise(walls)],
        cpu_s=[after - before for before, after in pairwise(cpus)],
        first_loss=first_loss,
        idle_bytes={"student": process.idle_bytes},
        extra_bytes={"student": process.extra_bytes()},
    )
