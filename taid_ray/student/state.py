"""What a student's training continues from, free of its layout: every trained parameter with its AdamW moments, whole and
in float32, whatever the ZeRO stage and the number of workers.

DeepSpeed's own universal checkpoints do the same for stages 1 to 3 only, through pickled files that one process must
convert first; its functions for single parameters, used here, work in every stage and leave the files to us.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

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

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
Lookup = Callable[[str, torch.Size], Tensor]
"""Key and shape -> the float32 tensor, on the CPU."""


def training_state(engine: Any, model: nn.Module, world: World) -> Iterator[tuple[str, Tensor | None]]:
    """Key and tensor of everything, one parameter at a time; None where another rank is to keep it. Collective.

    The moments exist once a step was taken.
    """
    _link_moments(engine)
    parameters = trained_parameters(model)
    owners = share(((name, _numel(p)) for name, p in parameters.items()), world.size)
    for name, parameter in parameters.items():
        for kind in (WEIGHT, *MOMENTS):
            whole = _get(engine, parameter, kind)
            yield f"{name}/{kind}", whole.to("cpu", copy=True) if owners[name] == world.rank else None


def load_weights(model: nn.Module, lookup: Lookup) -> None:
    """Before DeepSpeed takes the model: gives its trained parameters their saved values. Collective."""
    for name, parameter in trained_parameters(model).items():
        parameter.data.copy_(lookup(f"{name}/{WEIGHT}", parameter.shape))


def load_optimizer(engine: Any, model: nn.Module, lookup: Lookup, steps: int, world: World) -> None:
    """After it: the moments, and the float32 weights that bfloat16 parameters are rounded from. Collective.

    steps: optimizer steps that were taken.
    """
    optimizer = _torch_optimizer(engine)
    for updated in _updated(engine, optimizer):
        moments = {moment: torch.zeros_like(updated, dtype=torch.float32).detach() for moment in MOMENTS}
        optimizer.state[updated] = {"step": torch.tensor(float(steps), device=updated.device)} | moments
    _link_moments(engine)
    for name, parameter in trained_parameters(model).items():
        for kind in (WEIGHT, *MOMENTS):
            whole = lookup(f"{name}/{kind}", _shape(parameter))
            _set(engine, parameter, kind, whole.to(parameter.device), world)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _get(engine: Any, parameter: nn.Parameter, kind: str) -> Tensor:
    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if kind == WEIGHT else _torch_optimizer(engine).state[parameter][kind]
    if kind == WEIGHT:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def _set(engine: Any, parameter: nn.Parameter, kind: str, whole: Tensor, world: World) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        target = parameter.data if kind == WEIGHT else _torch_optimizer(engine).state[parameter][kind]
        target.copy_(whole)
    elif stage == 3:
        own = _partition(whole, cast(Any, parameter).ds_tensor.numel(), world.rank)
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, kind)
    elif kind == WEIGHT:
        safe_set_full_fp32_param(parameter, whole)
    else:
        safe_set_full_optimizer_state(parameter, whole, kind)


def _link_moments(engine: Any) -> None:
    """Tells DeepSpeed's functions for single parameters where the moments are.

    It does so itself in its first step, but then only of the first parameter group, whose moments alone exist by then.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _partition(whole: Tensor, numel: int, rank: int) -> Tensor:
    """A rank's part of a parameter under ZeRO 3, padded with zeros: DeepSpeed's own cut fails where it does not divide."""
    own = torch.zeros(numel, dtype=whole.dtype, device=whole.device)
    found = whole.flatten()[rank * numel : (rank + 1) * numel]
    own[: found.numel()] = found
    return own


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's wrapper, if there is one."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _updated(engine: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that AdamW keeps moments of on this rank: flat partitions, or with ZeRO 0 the parameters."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)  # handed to AdamW one after another, in its step
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
