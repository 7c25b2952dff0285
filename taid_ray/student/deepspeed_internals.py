"""Private parts of DeepSpeed that the package uses, all in one place; pyproject.toml bounds its version for their sake.

Read from DeepSpeed 0.19.8. Loads DeepSpeed only when it is asked to.
"""

import os
from typing import Any, cast

import torch
from torch import Tensor, nn


def use_deepspeed_on(device: str) -> None:
    """Settles DeepSpeed's accelerator, `cpu` or `cuda`, before its first import.

    On a CPU its optional shared-memory collectives would be compiled at the first start (minutes, and a process killed
    meanwhile leaves a lock that hangs every later run); gloo does the same work, so that operator is declared absent.
    """
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def link_moments(engine: Any) -> None:
    """Tells DeepSpeed's functions for single parameters where the moments are.

    It does so itself in its first step, but then only of the first parameter group, whose moments alone exist by then.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's wrapper, if there is one."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def updated_tensors(engine: Any) -> list[Tensor]:
    """The tensors that AdamW keeps moments of on this rank: flat partitions, or with ZeRO 0 the parameters."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)  # handed to AdamW one after another, in its step
    return [tensor for group in torch_optimizer(engine).param_groups for tensor in group["params"]]


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter before ZeRO 3 took it apart."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_numel(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter before ZeRO 3 took it apart."""
    return getattr(parameter, "ds_numel", parameter.numel())


def partition_numel(parameter: nn.Parameter) -> int:
    """The number of elements that each rank keeps of a parameter under ZeRO 3, padding included."""
    return int(cast(Any, parameter).ds_tensor.numel())
