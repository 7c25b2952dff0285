"""Adapters (LoRA, through peft) on a student, and the checks that it computes with them, and that they can be merged."""

import re
from typing import Any

import torch

from taid_ray.config.models import LoraConfig
from taid_ray.errors import ConfigError, ModelError, shortened
from taid_ray.media.families import FAMILIES
from taid_ray.models.head import hidden_states
from taid_ray.models.probes import attention_that_runs, of_the_machine, probe_inputs


def add_lora(model: Any, lora: LoraConfig, seed: int) -> Any:
    """Wraps `model` with adapters (in place, through peft); only they train. The same on every rank.

    In a model of FAMILIES, which sees images, only its language model gets some. Raises ConfigError if there are no such
    modules, ModelError if peft is not installed, or for an adapter on weights that are tied to others.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
    except ImportError:
        raise ModelError(
            "student.lora: the package peft is not installed; run `pip install 'taid-ray[lora]'`"
        ) from None
    settings = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=_outside_language(model),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(
                f"student.lora.target_modules: {type(model).__name__} takes no adapters there (found "
                f"{lora.target_modules!r}): {shortened(str(error))}"
            ) from None
    _refuse_tied(model)
    return adapted


def _outside_language(model: Any) -> str | None:
    """A pattern of the names of the modules that only images go through; None for a model of text.

    Adapters on those that images go through would be idle in every batch without one, and cannot be told from others by name.
    """
    if model.config.model_type not in FAMILIES:
        return None
    language = {
        id(module) for part in (model.get_decoder(), model.get_output_embeddings()) for module in part.modules()
    }
    names = [name for name, module in model.named_modules() if name and id(module) not in language]
    return "|".join(map(re.escape, names))


def _refuse_tied(adapted: Any) -> None:
    """Raises ModelError if an adapter is on weights that another module has, too: merging it would change that as well."""
    owners: dict[int, list[str]] = {}
    for name, module in adapted.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    for name, module in adapted.named_modules():
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if hasattr(module, "lora_A") and weight is not None and len(owners[id(weight)]) > 1:
            others = [other for other in owners[id(weight)] if other != name]
            raise ModelError(
                f"student.lora.target_modules names {name}, which this student ties to {others[0]}, so that the adapter could "
                f"not be merged; leave {name.rpartition('.')[2]} out of student.lora.target_modules"
            )


@torch.no_grad()
def idle_adapters(model: Any) -> list[str]:
    """Runs a student with adapters on a fixed probe. Returns the modules whose adapters its computation does not go through.

    Those stay what they are in the beginning, nothing: of an image encoder, or where an architecture reads a layer's weight
    past the adapter. Experts that no token of the probe is sent to do not count. Raises ModelError if the student does not
    compute with its adapters.
    """
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    called: set[str] = set()
    hooks = [module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in adapted.items()]
    embedding = model.get_input_embeddings().weight
    try:
        with attention_that_runs(model, embedding.device):
            hidden = hidden_states(model, probe_inputs(embedding.shape[0], embedding.device))
            model.get_output_embeddings()(hidden)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        if of_the_machine(error):
            raise
        raise ModelError(
            f"student.lora.target_modules: {type(model).__name__} does not compute with adapters there "
            f"({shortened(error)}); name other modules"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in adapted if name not in called and "expert" not in name]
