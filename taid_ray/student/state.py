"""State of a student's training, free of its layout: every trained parameter with its AdamW moments, whole and in float32,
whatever the ZeRO stage and the number of workers.

DeepSpeed's own universal checkpoints do the same for stages 1 to 3 only, through pickled files that one process must
convert first; its functions for single parameters, used here, work in every stage and leave the files to us.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from taid_ray.checkpoint.store import share
from taid_ray.distributed.world import World
from taid_ray.student.deepspeed_internals import (
    link_moments,
    partition_numel,
    torch_optimizer,
    updated_tensors,
    whole_numel,
    whole_shape,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
Lookup = Callable[[str, torch.Size], Tensor]
"""Key and shape -> the float32 tensor, on the CPU."""


Parameters = Mapping[str, nn.Parameter]
"""What training changes, by name."""


def training_state(engine: Any, parameters: Parameters, world: World) -> Iterator[tuple[str, Tensor | None]]:
    """Keys and tensors, one parameter after another; None in place of a tensor that another rank is to save. Collective.

    The moments exist once a step was taken.
    """
    link_moments(engine)
    owners = share(((name, whole_numel(p)) for name, p in parameters.items()), world.size)
    for name, parameter in parameters.items():
        for kind in (WEIGHT, *MOMENTS):
            whole = _get(engine, parameter, kind)
            yield f"{name}/{kind}", whole.to("cpu", copy=True) if owners[name] == world.rank else None


def load_weights(parameters: Parameters, lookup: Lookup) -> None:
    """Gives the parameters their saved values, before DeepSpeed takes them. Collective."""
    for name, parameter in parameters.items():
        parameter.data.copy_(lookup(f"{name}/{WEIGHT}", parameter.shape))


def load_optimizer(engine: Any, parameters: Parameters, lookup: Lookup, steps: int, world: World) -> None:
    """Gives the engine the saved moments, and the float32 weights that bfloat16 parameters are rounded from. Collective.

    steps: optimizer steps that were taken.
    """
    optimizer = torch_optimizer(engine)
    for updated in updated_tensors(engine):
        moments = {moment: torch.zeros_like(updated, dtype=torch.float32).detach() for moment in MOMENTS}
        optimizer.state[updated] = {"step": torch.tensor(float(steps), device=updated.device)} | moments
    link_moments(engine)
    for name, parameter in parameters.items():
        for kind in (WEIGHT, *MOMENTS):
            whole = lookup(f"{name}/{kind}", whole_shape(parameter))
            _set(engine, parameter, kind, whole.to(parameter.device), world)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by their names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _get(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if kind == WEIGHT else torch_optimizer(engine).state[parameter][kind]
    if kind == WEIGHT:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def _set(engine: Any, parameter: nn.Parameter, kind: str, whole: Tensor, world: World) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        target = parameter.data if kind == WEIGHT else torch_optimizer(engine).state[parameter][kind]
        target.copy_(whole)
    elif stage == 3:
        own = _partition(whole, partition_numel(parameter), world.rank)
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, kind)
    elif kind == WEIGHT:
        safe_set_full_fp32_param(parameter, whole)
    else:
        safe_set_full_optimizer_state(parameter, whole, kind)


def _partition(whole: Tensor, numel: int, rank: int) -> Tensor:
    """Part of a rank in a parameter under ZeRO 3, padded with zeros: DeepSpeed's own cut fails where it does not divide."""
    own = torch.zeros(numel, dtype=whole.dtype, device=whole.device)
    found = whole.flatten()[rank * numel : (rank + 1) * numel]
    own[: found.numel()] = found
    return own
