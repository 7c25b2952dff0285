"""Where the student's weights come from (loaded, new, or cut out of the teacher) and how they leave (merged)."""

import copy
import warnings
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from taid_ray.config import DistillConfig, LoraConfig
from taid_ray.errors import ConfigError, ModelError
from taid_ray.models import load_causal_lm, load_model_config


def build_student(config: DistillConfig, num_rows: int | None) -> Any:
    """The student before training, float32 on CPU. A pure function of the config, so every rank builds the same.

    num_rows: resize the embedding to this many rows (`student.resize_to_teacher`), None to leave it.
    """
    student = config.student
    match student.init:
        case "pretrained":
            model = load_causal_lm(
                str(student.model),
                revision=student.revision,
                dtype="float32",
                attention=student.attention,
                trust_remote_code=student.trust_remote_code,
                key="student.model",
            )
        case "scratch":
            model = from_architecture(
                student_model_config(config), student.attention, config.train.seed, student.trust_remote_code
            )
        case "cut":
            model = cut_layers(config)
    if num_rows is not None:
        resize_with_mean(model, num_rows)
    return model


def student_model_config(config: DistillConfig) -> Any:
    """The transformers config of the student as it will be built (before any resize)."""
    student, teacher = config.student, config.teacher
    own = student.model is not None
    result = load_model_config(
        str(student.model) if own else teacher.model,
        revision=student.revision if own else teacher.revision,
        trust_remote_code=student.trust_remote_code if own else teacher.trust_remote_code,
        key="student.model" if own else "teacher.model",
    )
    if student.init == "scratch":
        for key, value in student.architecture.items():
            if not hasattr(result, key):
                raise ConfigError(
                    f"student.architecture.{key}: {type(result).__name__} has no such field (found {value!r})"
                )
            try:
                setattr(result, key, value)
            except (TypeError, ValueError, StrictDataclassError) as error:
                raise ConfigError(
                    f"student.architecture.{key}: not a value that {type(result).__name__} takes (found {value!r}); "
                    f"{error.__cause__ or error}"
                ) from None
    if student.init == "cut":
        _keep_layers(result, student.layers or [])
    return result


def check_student(config: DistillConfig, model_config: Any) -> None:
    """Builds a student of new shape, or with adapters, without its weights, to see that it can be built.

    Raises ConfigError or ModelError.
    """
    student = config.student
    if student.init != "scratch" and student.lora is None:
        return
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        try:
            if student.architecture and hasattr(model_config, "validate"):
                model_config.validate()
            model = from_architecture(model_config, student.attention, 0, student.trust_remote_code)
        except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError, StrictDataclassError) as error:
            raise ConfigError(
                f"student.architecture: no {type(model_config).__name__} model can be built with {student.architecture} "
                f"({' '.join(str(error).split())[:200]})"
            ) from None
        if student.lora is not None:
            add_lora(model, student.lora, 0)


def _keep_layers(model_config: Any, layers: list[int]) -> None:
    """Cuts num_hidden_layers, and every per-layer list of a transformers config, down to `layers` in place."""
    depth = model_config.num_hidden_layers
    wrong = [layer for layer in layers if layer >= depth]
    if wrong:
        raise ConfigError(f"student.layers: the teacher has layers 0 to {depth - 1} (found {wrong}); leave those out")
    for key, value in list(vars(model_config).items()):
        if isinstance(value, list) and len(value) == depth and key.startswith("layer"):
            setattr(model_config, key, [value[layer] for layer in layers])
    model_config.num_hidden_layers = len(layers)


def from_architecture(model_config: Any, attention: str, seed: int, trust_remote_code: bool = False) -> Any:
    """A model with new weights, the same on every rank."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            model_config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
        )


def cut_layers(config: DistillConfig) -> Any:
    """A shallower copy of the teacher: embeddings, norms and head as they are, and the chosen layers in order."""
    teacher = load_causal_lm(
        config.teacher.model,
        revision=config.teacher.revision,
        dtype="float32",
        attention=config.student.attention,
        trust_remote_code=config.teacher.trust_remote_code,
        key="teacher.model",
    )
    student = from_architecture(student_model_config(config), config.student.attention, config.train.seed)
    stack, state = _layer_stack(teacher), teacher.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(f"{stack}.")}
    for new, old in enumerate(config.student.layers or []):
        prefix = f"{stack}.{old}."
        kept |= {f"{stack}.{new}.{name[len(prefix) :]}": state[name] for name in state if name.startswith(prefix)}
    student.load_state_dict(kept)
    student.generation_config = teacher.generation_config
    return student


def _layer_stack(model: Any) -> str:
    """Name of the ModuleList that holds the decoder layers."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name
    raise ModelError(
        f"teacher.model: {type(model).__name__} keeps its {depth} layers in no single list, so student.init: cut cannot "
        "take some of them; set student.init to pretrained or scratch"
    )


def resize_with_mean(model: Any, num_rows: int) -> None:
    """Gives input embedding and head `num_rows` rows; new ones are the mean of the old (no random numbers)."""
    old_rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            if num_rows > old_rows:
                module.weight[old_rows:] = module.weight[:old_rows].mean(0)
                if getattr(module, "bias", None) is not None:
                    module.bias[old_rows:] = module.bias[:old_rows].mean(0)


def add_lora(model: Any, lora: LoraConfig, seed: int) -> Any:
    """Wraps `model` with adapters (in place, through peft); only they train. The same on every rank.

    Raises ConfigError if there are no such modules, ModelError if peft is not installed, or for an adapter on a head that
    is tied to the embedding (merging it would change the embedding too).
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
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(
                f"student.lora.target_modules: {type(model).__name__} takes no adapters there (found "
                f"{lora.target_modules!r}): {' '.join(str(error).split())[:200]}"
            ) from None
    head = model.get_output_embeddings()
    if hasattr(head, "lora_A") and head.base_layer.weight is model.get_input_embeddings().weight:
        raise ModelError(
            "student.lora.target_modules names the head, which this student ties to its embedding, so that the adapter could "
            "not be merged; leave the head out of student.lora.target_modules"
        )
    return adapted


def merged_model(config: DistillConfig, source: Any, state: dict[str, Tensor]) -> Any:
    """A plain transformers model on CPU with the trained weights `state`, adapters merged, in the student's dtype.

    source: the model that was trained, for its config; its own weights may be partitioned.
    """
    student = config.student
    model = from_architecture(
        copy.deepcopy(source.config), student.attention, config.train.seed, student.trust_remote_code
    )
    model.generation_config = source.generation_config
    lora = config.student.lora
    trained = add_lora(model, lora, config.train.seed) if lora else model
    missing, unexpected = trained.load_state_dict(state, strict=False)
    tied = {f"{prefix}{key}" for prefix in ("", "base_model.model.") for key in (model._tied_weights_keys or ())}
    assert not unexpected and not set(missing) - tied, (missing, unexpected)
    merged = trained.merge_and_unload() if lora else model
    return merged.to(getattr(torch, config.student.dtype))
