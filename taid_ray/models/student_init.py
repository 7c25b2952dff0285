"""Building the student: loaded, new, or cut out of the teacher."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from taid_ray.config.models import StudentConfig, TeacherConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.errors import ConfigError, ModelError, shortened
from taid_ray.models.adapters import add_lora
from taid_ray.models.cut import keep_layers, kept_state
from taid_ray.models.freezing import freeze
from taid_ray.models.loading import (
    auto_class,
    explained_attention,
    implementation,
    load_causal_lm,
    load_generation_config,
    load_model_config,
)
from taid_ray.models.vocabulary import Vocabulary

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def build_student(config: DistillConfig, vocabulary: Vocabulary | None) -> Any:
    """Builds the student before training, float32 on CPU. A pure function of the config, so every rank builds the same.

    vocabulary: the one that `student.resize_to_teacher` resizes to; without it the embedding is left as it is. Raises
    ConfigError or ModelError.
    """
    student = config.student
    match student.init:
        case "pretrained":
            model = load_causal_lm(student, dtype="float32", images=config.data.has_images)
        case "scratch":
            with explained_attention(student.attention, "student"):
                model = from_architecture(
                    student_model_config(config),
                    student.attention,
                    config.train.seed,
                    origin(config).trust_remote_code,
                    images=config.data.has_images,
                )
        case "cut":
            model = cut_layers(config)
    if vocabulary is not None and student.resize_to_teacher:
        resize_with_mean(model, vocabulary)
    if has_teacher_tokenizer(config):
        take_token_ids(model, config)
    freeze(model, student.freeze)
    return model


def origin(config: DistillConfig) -> StudentConfig | TeacherConfig:
    """Returns the section whose model, revision and code the student's architecture comes from."""
    return config.given_teacher if config.student.model is None else config.student


def has_teacher_tokenizer(config: DistillConfig) -> bool:
    """Tells whether data are encoded, and the student is saved, with the teacher's tokenizer."""
    return config.student.model is None or config.student.resize_to_teacher


def student_model_config(config: DistillConfig) -> Any:
    """Makes the transformers config of the student as it will be built (before any resize).

    Raises ConfigError or ModelError.
    """
    student, result = config.student, load_model_config(origin(config))
    if student.init == "scratch":
        _change(result, student.architecture, "student.architecture")
    if student.init == "cut":
        _check_deep_features(result, student.layers or [])
        keep_layers(result.get_text_config(), student.layers or [])
    return result


def _change(model_config: Any, values: Mapping[str, Any], key: str) -> None:
    """Replaces values of a config in place; a mapping changes the config of a part, such as `text_config`."""
    for name, value in values.items():
        if not hasattr(model_config, name):
            raise ConfigError(f"{key}.{name}: {type(model_config).__name__} has no such field (found {value!r})")
        part = getattr(model_config, name)
        if isinstance(value, Mapping) and hasattr(part, "model_type"):
            _change(part, value, f"{key}.{name}")
            continue
        try:
            setattr(model_config, name, value)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ConfigError(
                f"{key}.{name}: not a value that {type(model_config).__name__} takes (found {value!r}); "
                f"{error.__cause__ or error}"
            ) from None


def _check_deep_features(model_config: Any, layers: list[int]) -> None:
    """Raises ConfigError if too few layers are left for what a vision tower hands to each of the first ones (Qwen3-VL)."""
    needed = len(getattr(getattr(model_config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if 0 < len(layers) < needed:
        raise ConfigError(
            f"student.layers: {type(model_config).__name__} adds what its vision tower sees to its first {needed} layers (found "
            f"{layers}); keep at least {needed}"
        )


def check_student(config: DistillConfig, model_config: Any) -> None:
    """Builds a student of other shape, with frozen parts or with adapters, without its weights, to see that it can be built.

    Raises ConfigError or ModelError.
    """
    student, remote_code = config.student, origin(config).trust_remote_code
    images = config.data.has_images
    if student.init == "pretrained" and student.lora is None and not student.freeze:
        return
    key, value = (
        ("student.layers", student.layers) if student.init == "cut" else ("student.architecture", student.architecture)
    )
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        try:
            if student.architecture and hasattr(model_config, "validate"):
                model_config.validate()
            # Flash attention need not be installed where nothing is computed, for example on the driver.
            attention = "eager" if "flash" in student.attention else student.attention
            with explained_attention(attention, "student"):
                model = from_architecture(model_config, attention, 0, remote_code, images=images)
        except ModelError:
            raise
        except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError, StrictDataclassError) as error:
            raise ConfigError(
                f"{key}: no {type(model_config).__name__} model can be built with {value} ({shortened(str(error))}); choose "
                "another value, or set student.init: pretrained"
            ) from None
        if student.init == "cut":
            whole = load_model_config(origin(config))
            teacher = from_architecture(whole, attention, 0, remote_code, images=images)
            kept_state(teacher, model, student.layers or [])
        freeze(model, student.freeze)
        if student.lora is not None:
            add_lora(model, student.lora, 0)


def from_architecture(
    model_config: Any,
    attention: str,
    seed: int,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    images: bool = False,
) -> Any:
    """Makes a model with new weights, on CPU unless a device is set, the same on every rank; `images`: one that is shown them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class(images).from_config(
            model_config,
            dtype=dtype,
            attn_implementation=implementation(attention),
            trust_remote_code=trust_remote_code,
        )


def cut_layers(config: DistillConfig) -> Any:
    """Makes a shallower copy of the teacher: embeddings, norms and head as they are, and the chosen layers in order."""
    whole = {"attention": "eager", "quantization": {}, "shards": 1}  # only its weights are used
    section = config.given_teacher
    images = config.data.has_images
    teacher = load_causal_lm(section.model_copy(update=whole), dtype="float32", images=images)
    with explained_attention(config.student.attention, "student"):
        student = from_architecture(
            student_model_config(config),
            config.student.attention,
            config.train.seed,
            section.trust_remote_code,
            images=images,
        )
    student.load_state_dict(kept_state(teacher, student, config.student.layers or []))
    student.generation_config = teacher.generation_config
    return student


def resize_with_mean(model: Any, vocabulary: Vocabulary) -> None:
    """Gives input embedding and head a row for each of the teacher's ids (no random numbers).

    Rows of ids that the student lacks, be they appended or padding so far, become the mean of those that both know.
    """
    old_rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary.student_rows > old_rows:
        model.resize_token_embeddings(vocabulary.student_rows, mean_resizing=False)
    known = vocabulary.known_ids()
    new = sorted({*vocabulary.new_ids, *range(old_rows, vocabulary.student_rows)})
    if not new:
        return
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    found = [getattr(module, name, None) for module in modules for name in ("weight", "bias")]
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in found if tensor is not None}.values():  # tied ones once
            tensor[new] = tensor[known].mean(0)


def take_token_ids(model: Any, config: DistillConfig) -> None:
    """Gives the model the teacher's bos, eos and pad ids, by which its tokenizer's texts begin and end."""
    rows = model.get_input_embeddings().weight.shape[0]
    teacher_config = load_model_config(config.given_teacher)
    generation = load_generation_config(config.given_teacher, teacher_config)
    text = model.config.get_text_config()
    for key in TOKEN_IDS:
        if key in config.student.architecture:
            continue
        value = getattr(teacher_config.get_text_config(), key, None)
        generated = getattr(generation, key, None)
        if key == "pad_token_id":  # an embedding cannot be built with one that has no row
            value, generated = (pad if pad is not None and 0 <= pad < rows else None for pad in (value, generated))
        for each in (text, *([model.config] if hasattr(model.config, key) else [])):
            setattr(each, key, value)
        if model.generation_config is not None:
            setattr(model.generation_config, key, value if generated is None else generated)
