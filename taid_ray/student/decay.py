"""Which parameters weight decay pulls towards zero: matrices and embeddings, by what a parameter does in the model."""

import re
from typing import Any

from torch import nn

STATE = re.compile(r"(\w+_)?(A_log|A|D|dt|decay|sinks?|scale)|time_\w+")
"""Own names of the parameters of state spaces, of attention sinks and of learnt scales, whatever their shape."""
NORM = re.compile(r"norm(?!al)", re.IGNORECASE)
"""Part of the name of every class of norms; a normalised linear layer is none."""


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of the trained parameters of a model: those that decay, and those that do not."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in trained:
        groups[decays(name, parameter, model.get_submodule(name.rpartition(".")[0]))].append(parameter)
    rates = {True: weight_decay, False: 0.0}
    return [{"params": found, "weight_decay": rates[decayed]} for decayed, found in groups.items() if found]


def decays(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Tests whether a parameter decays: matrices do, also stacks of them, one per expert; so do embeddings and kernels.

    Biases, norms, the state of state spaces and other vectors do not, also where they have more dimensions, for example a row
    per expert or head; nor does what the model's author marked with `_no_weight_decay`.

    name: in the whole model. owner: the module that the parameter belongs to.
    """
    own_name = name.rpartition(".")[2]
    if parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False):
        return False
    if "bias" in name or NORM.search(type(owner).__name__) or STATE.fullmatch(own_name):
        return False
    # The weight of a linear layer with one output is a matrix; a parameter of shape [1, 1, H] on its own is a vector.
    return own_name == "weight" or sum(size > 1 for size in parameter.shape) > 1
