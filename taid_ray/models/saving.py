"""The model that a run leaves: put together without adapters, written in the end, and proven at the start to be writable."""

import copy
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taid_ray.config.models import LoraConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ConfigError, ModelError, shortened
from taid_ray.files import give_usual_mode
from taid_ray.models.adapters import add_lora
from taid_ray.models.loading import load_generation_config
from taid_ray.models.precision import floating_tensors, reloaded_dtypes
from taid_ray.models.student_init import from_architecture, origin

SAMPLING_VALUES = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAM_VALUES = ("early_stopping", "length_penalty")


def check_architecture(config: DistillConfig, model_config: Any) -> None:
    """Checks that a student of this transformers config can be saved, before there are weights; see `check_saving`.

    Raises ModelError.
    """
    student = config.student
    try:
        model = student_skeleton(config, model_config, "float32")
        if student.init != "scratch":
            model.generation_config = load_generation_config(origin(config), model_config)
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            dtypes_when_reloaded(config, model)
            trained = add_lora(model, student.lora, 0) if student.lora else model
    except (ConfigError, ModelError):
        raise
    except Exception as error:
        raise _cannot_be_saved(type(model_config).__name__, error) from error
    check_saving(config, model, trained)


def check_saving(config: DistillConfig, model: Any, trained: nn.Module) -> None:
    """Does all that saving does, on the meta device, where tensors have shapes and no values; it takes seconds at most.

    model: the student. trained: the same, or its wrapper with adapters. Raises ModelError if the student cannot be saved.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {name: tensor.to("meta") for name, tensor in saved_tensors(trained).items()}
    try:
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(action="ignore"):
            merged = merged_model(config, model, state)
            # What save_pretrained does before it writes. Itself it would load DeepSpeed, if only to unwrap a model from it, and
            # the driver must not.
            revert_weight_conversion(merged, remove_tied_weights_from_state_dict(merged.state_dict(), merged))
            merged.config.save_pretrained(directory)
            if merged.can_generate():
                _try_generation_config(merged.generation_config, directory)
    except ModelError:
        raise
    except Exception as error:  # of transformers, peft, torch, or of the model's own code; all mean the same
        raise _cannot_be_saved(type(model).__name__, error) from error


def save_model(config: DistillConfig, model: Any, state: Mapping[str, Tensor], directory: Path) -> None:
    """Writes a Hugging Face model directory of the weights `state` of the student `model`; see `merged_model`."""
    directory.mkdir(parents=True, exist_ok=True)  # transformers returns without an error if a file is in the way
    merged_model(config, model, state).save_pretrained(directory)
    for file in directory.glob("*.safetensors"):
        give_usual_mode(file)  # safetensors makes files for their owner alone


def saved_tensors(trained: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model, without a second name for a tensor that is tied."""
    saved = trained.state_dict().keys()  # leaves out buffers that are computed anew, such as rotary tables
    buffers = {name: buffer for name, buffer in trained.named_buffers() if name in saved}
    return buffers | dict(trained.named_parameters())


def merged_model(config: DistillConfig, source: Any, state: Mapping[str, Tensor]) -> Any:
    """Makes a plain transformers model of trained weights, adapters merged, each tensor in the dtype it is reloaded in.

    It can be saved, but not run: buffers that are computed anew when a model is loaded are on the meta device.

    source: the model that was trained, for its configs; its own weights may be partitioned. state: see `saved_tensors`, on
    one device. Raises ModelError if the state is not one of this model.
    """
    if config.student.lora:
        state = _without_adapters(config, config.student.lora, source, state)
    model = student_skeleton(config, source.config, config.student.dtype)
    model.generation_config = without_idle_values(source.generation_config)
    dtypes = reloaded_dtypes(model)
    _assign(model, {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in state.items()})
    return model


def dtypes_when_reloaded(config: DistillConfig, model: Any) -> dict[int, torch.dtype]:
    """The dtypes that the model's tensors will have when it is reloaded in the student's dtype, by the id of the tensor.

    model: without adapters. Raises ModelError if its output projection will have another dtype: the loss is computed in that of
    the hidden states.
    """
    names = reloaded_dtypes(student_skeleton(config, model.config, config.student.dtype))
    found = {id(tensor): names[name] for name, tensor in floating_tensors(model) if name in names}
    head = found.get(id(getattr(model.get_output_embeddings(), "weight", None)))
    if head not in (None, getattr(torch, config.student.dtype)):
        raise ModelError(
            f"student.dtype: {type(model).__name__} keeps its output projection in {str(head).removeprefix('torch.')}, where it "
            f"cannot be trained in {config.student.dtype}; set student.dtype: float32"
        )
    return found


def student_skeleton(config: DistillConfig, model_config: Any, dtype: str) -> Any:
    """Builds a model on the meta device, where tensors have shapes and no values."""
    remote_code = origin(config).trust_remote_code
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return from_architecture(
            copy.deepcopy(model_config),
            "eager",
            config.train.seed,
            remote_code,
            getattr(torch, dtype),
            config.data.has_images,
        )


def without_idle_values(generation_config: Any) -> Any:
    """Returns a copy without values that generation ignores, but with which transformers, having loaded them, saves nothing."""
    result = copy.deepcopy(generation_config)
    if result is None:
        return result
    idle = [] if result.do_sample else [*SAMPLING_VALUES]
    idle += BEAM_VALUES if result.num_beams in (None, 1) else ()
    idle += ["pad_token_id"] if (getattr(result, "pad_token_id", None) or 0) < 0 else []
    for key in idle:
        setattr(result, key, None)
    return result


def _try_generation_config(generation_config: Any, directory: str) -> None:
    try:
        generation_config.save_pretrained(directory)
    except ValueError as error:
        raise ModelError(
            "the student's generation_config.json can be loaded, but not saved with the trained model "
            f"({shortened(str(error))}); correct it where the student comes from"
        ) from None


def _without_adapters(
    config: DistillConfig, lora: LoraConfig, source: Any, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of the plain model, adapters merged in float32."""
    model = student_skeleton(config, source.config, "float32")
    with torch.device("meta"):
        adapted = add_lora(model, lora, config.train.seed)
    _assign(adapted, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()})
    merged = adapted.merge_and_unload()
    names = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in state]
    return {name: merged.get_parameter_or_buffer(name).detach() for name in names if ".lora_" not in name}


def _assign(model: Any, state: Mapping[str, Tensor]) -> None:
    """Gives a model the tensors of a state that has one name for tied ones. Raises ModelError unless it is the whole state."""
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    whole = dict(state)
    for names in tied.values():
        given = [name for name in names if name in state]
        whole |= {name: state[given[0]] for name in names if given and name not in state}
    try:
        model.load_state_dict(whole, assign=True)
    except RuntimeError as error:
        raise _cannot_be_saved(type(model).__name__, error) from error


def _cannot_be_saved(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"the student, a {name}, cannot be saved as a Hugging Face model "
        f"({shortened(error)}), so it is not trained; choose another student, or "
        "report its name"
    )
