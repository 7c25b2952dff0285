"""Precision of a student's tensors: in training each has the one that a reload of the saved model gives it.

`from_pretrained(dtype=bfloat16)` leaves some tensors in float32: those that an architecture names (the bias of a router, the
decay of a state space) or makes so itself. DeepSpeed would train with bfloat16 in place of such parameters, and with float32
in place of all other buffers, and so with another model than the one that is saved.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def reloaded_dtypes(skeleton: Any) -> dict[str, torch.dtype]:
    """The dtype of each floating-point tensor, by name, once the model is loaded in the dtype that `skeleton` was built in.

    skeleton: a transformers model without adapters; its tensors may be on the meta device. Tied tensors have all names.
    """
    names = getattr(skeleton, "_keep_in_fp32_modules_strict", None) or ()
    kept = re.compile("|".join(name.replace("*", ".*") for name in sorted(names))) if names else None
    return {
        name: torch.float32 if kept and kept.search(name) else tensor.dtype
        for name, tensor in floating_tensors(skeleton)
    }


def floating_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point parameters and buffers with their names; a tensor that is tied comes under each of them."""
    found = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return ((name, tensor) for name, tensor in found if tensor.is_floating_point())


def train_as_reloaded(trained: nn.Module, dtypes: Mapping[int, torch.dtype]) -> None:
    """Prepares a model in float32, in place, so that DeepSpeed's cast of all parameters to bfloat16 does no harm.

    Buffers get their dtype. Frozen parameters of dtype float32 become buffers, which DeepSpeed leaves alone. Trained ones
    become bfloat16, and what computes with them finds float32 copies of that.

    dtypes: those of the reloaded model, by the id of the tensor.
    """
    for module in trained.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in dtypes:
                module._buffers[name] = buffer.to(dtypes[id(buffer)])
        kept = {
            name: p for name, p in module._parameters.items() if p is not None and dtypes.get(id(p)) == torch.float32
        }
        for name in [name for name, parameter in kept.items() if not parameter.requires_grad]:
            del module._parameters[name]
            module.register_buffer(name, kept.pop(name).detach())
        if kept:
            _compute_in_float32(module, frozenset(kept))


def _compute_in_float32(module: nn.Module, names: frozenset[str]) -> None:
    """Makes whoever reads the module's parameters `names` as attributes find float32 copies, through which gradients flow.

    Optimizer, ZeRO and state_dict look elsewhere, and find the parameters themselves.
    """
    plain = type(module)

    def getattr_(self: nn.Module, name: str) -> Any:
        found = plain.__getattr__(self, name)
        return found.float() if name in names else found

    module.__class__ = type(plain.__name__, (plain,), {"__getattr__": getattr_, "__module__": plain.__module__})
