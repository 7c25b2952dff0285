"""Parts of a student that are not trained: those that `student.freeze` names, and those that its computation goes past."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from taid_ray.errors import ConfigError


def freeze(model: Any, names: list[str]) -> None:
    """Freezes modules of a student in place: no gradients, and no dropout even in training.

    names: of modules, whole (`model.vision_tower`) or their last part (`vision_tower`). Raises ConfigError for one that the model
    does not have, and if nothing is left to train.
    """
    for name in names:
        found = [module for path, module in model.named_modules() if path and f".{path}".endswith(f".{name}")]
        if not found:
            raise ConfigError(
                f"student.freeze: {type(model).__name__} has no module {name!r} (it has: {', '.join(_outer_modules(model))}); "
                "name one that it has"
            )
        for module in found:
            module.requires_grad_(False)
            module.eval()
            module.train = MethodType(_stay, module)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"student.freeze: {names} leaves nothing of {type(model).__name__} to train; freeze less")


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Takes the place of `train` of a frozen module, which stays in eval mode."""
    return module


def _outer_modules(model: Any) -> list[str]:
    """Names of a model's modules down to two levels, without numbered ones."""
    paths = [path for path, _ in model.named_modules() if path and path.count(".") <= 1]
    return [path for path in paths if not any(part.isdigit() for part in path.split("."))]


def freeze_unreached(model: Any, hidden: Tensor) -> list[str]:
    """Freezes what `hidden` does not depend on, so that it could never be trained, and returns the names of its parameters.

    Some models compute layers whose result they do not use: LLaVA takes the last but one layer of its vision tower. hidden:
    hidden states of inputs with an image, with their graph.
    """
    reached = _leaves(hidden)
    head = model.get_output_embeddings()
    reached |= {id(parameter) for parameter in head.parameters()}
    unreached = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached
    ]
    for _, parameter in unreached:
        parameter.requires_grad_(False)
    return [name for name, _ in unreached]


def _leaves(tensor: Tensor) -> set[int]:
    """Ids of the tensors that a gradient of `tensor` would go to."""
    found: set[int] = set()
    seen: set[torch.autograd.graph.Node] = set()
    pending = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    return found
