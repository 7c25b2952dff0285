"""Loading Hugging Face causal language models, their configs and tokenizers, with errors that name the configuration key.

`source` is the section of the configuration that names a model.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from taid_ray.config.models import StudentConfig, TeacherConfig
from taid_ray.errors import ModelError, shortened
from taid_ray.media.families import FAMILIES, family_of
from taid_ray.models.tokenizer import check_tokenizer

Source = TeacherConfig | StudentConfig
NOT_SHARDED = ("doge", "hrm_text", "lfm2", "lfm3")
"""Types of models whose tensor parallelism in transformers fails, or (hrm_text) gives other hidden states."""


def section_name(source: Source) -> str:
    """Returns the name of a model's section: teacher or student."""
    return "teacher" if isinstance(source, TeacherConfig) else "student"


def load_model_config(source: Source) -> Any:
    """Loads the transformers config of a model. Raises ModelError if there is no such model."""
    from transformers import AutoConfig

    with _explained(source, "configuration") as name:
        return AutoConfig.from_pretrained(name, revision=source.revision, trust_remote_code=source.trust_remote_code)


def load_tokenizer(source: Source) -> Any:
    """Loads the tokenizer of a model. Raises ModelError if there is none, or if it is not whole, see `check_tokenizer`."""
    from transformers import AutoTokenizer

    with _explained(source, "tokenizer") as name:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    check_tokenizer(tokenizer, f"{section_name(source)}.model = {source.model}")
    return tokenizer


def load_generation_config(source: Source, model_config: Any) -> Any:
    """Loads the generation settings of a model; where it has none of its own, those that its config implies.

    Raises ModelError if they contradict each other.
    """
    from transformers import GenerationConfig

    path = Path(str(source.model)).expanduser()
    try:
        return GenerationConfig.from_pretrained(
            str(path) if path.is_dir() else str(source.model), revision=source.revision or "main"
        )
    except OSError:
        return GenerationConfig.from_model_config(model_config)
    except ValueError as error:
        raise ModelError(
            f"{section_name(source)}.model = {source.model}: its generation_config.json is not valid "
            f"({' '.join(str(error).split())[:200]}); correct it"
        ) from None


def auto_class(images: bool) -> Any:
    """Returns the class of transformers that loads language models; `images`: those that are shown images, too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def check_causal_lm(model_config: Any, key: str, images: bool = False) -> None:
    """Raises ModelError, naming `key`, if transformers has no causal language model for this config.

    images: the model is to be one that can be shown images.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if images:
        family_of(model_config, key)
        return
    own_code = "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {})
    if not own_code and type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{key}: a model of type {model_config.model_type} is not a causal language model. Choose another one."
        )
    try:
        model_config.get_text_config()
    except ValueError:  # MusicGen: several models that read text
        raise ModelError(
            f"{key}: a model of type {model_config.model_type} holds several text models. Choose another one."
        ) from None


def check_divisible(teacher_config: Any, shards: int) -> None:
    """Raises ModelError if transformers cannot split the teacher, or its attention heads evenly, among `shards` processes."""
    text = teacher_config.get_text_config()
    if shards > 1 and text.model_type in NOT_SHARDED:
        raise ModelError(
            f"teacher.shards = {shards}: transformers does not split a model of type {text.model_type} rightly; set "
            "teacher.shards: 1"
        )
    if shards > 1 and teacher_config.model_type in FAMILIES and not text.base_model_tp_plan:
        raise ModelError(
            f"teacher.shards = {shards}: transformers has no plan to split a model of type {teacher_config.model_type}; set "
            "teacher.shards: 1"
        )
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, field, None) or shards
        if heads % shards:
            raise ModelError(
                f"teacher.shards = {shards} does not divide the model's {field} = {heads}; choose a number that does"
            )


def check_weights(source: Source) -> None:
    """Raises ModelError unless a local model directory holds all its weights, by the headers of its safetensors files.

    Accepts every model of the hub, whose downloads the hub's client checks.
    """
    from safetensors import SafetensorError, safe_open

    key, directory = f"{section_name(source)}.model", Path(str(source.model)).expanduser()
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not directory.is_dir() or any(directory.glob("pytorch_model*.bin")):
        return
    again = "Download or save the model again."
    if not single.is_file() and not index.is_file():
        raise ModelError(f"{key}: {source.model} holds no weights (model.safetensors). {again}")
    file, missing = index, []
    try:
        wanted = ["model.safetensors"]
        if not single.is_file():
            wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [part for part in wanted if not (directory / part).is_file()]
        for file in [directory / part for part in wanted if part not in missing]:
            with safe_open(file, framework="pt"):
                pass
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{key}: {file} is damaged or incomplete ({shortened(error)}). {again}") from None
    if missing:
        raise ModelError(
            f"{key}: {source.model} lacks {len(missing)} of {len(wanted)} weight files, for example {missing[0]}. {again}"
        )


def load_causal_lm(
    source: Source, *, dtype: str | None = None, device: torch.device | None = None, images: bool = False
) -> Any:
    """Loads a causal language model in eval mode, on CPU unless `device` says otherwise.

    dtype: by default the source's. images: the model is one that is shown images. With teacher.shards above 1 the result is
    this process's part of a tensor-parallel model, and all processes of the group must call it together. Raises ModelError if
    there is no such model, its architecture or a setting is not supported, or the checkpoint lacks weights.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # taid-ray reports progress itself, and actors' bars would mix with it
    section, placement = section_name(source), _placement(source, device)
    with _explained(source, "model") as name, explained_attention(source.attention, section):
        loaded: Any = auto_class(images).from_pretrained(
            name,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype=dtype or source.dtype,
            attn_implementation=implementation(source.attention),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with a message of our own
            **placement,
        )
    model, loading = loaded
    if loading["missing_keys"] or loading["mismatched_keys"]:
        absent = sorted([*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])])
        raise ModelError(
            f"{section}.model = {source.model}: the checkpoint has no weights that fit {len(absent)} parameters of "
            f"{type(model).__name__} ({', '.join(absent[:3])} ...); name a complete causal language model"
        )
    return model.eval()


def _placement(source: Source, device: torch.device | None) -> dict[str, Any]:
    """The arguments of from_pretrained that say how the weights are stored, and where."""
    quantization, shards = (source.quantization, source.shards) if isinstance(source, TeacherConfig) else ({}, 1)
    options: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    if shards > 1:
        from transformers.distributed import DistributedConfig

        check_divisible(load_model_config(source), shards)
        return options | {"distributed_config": DistributedConfig(tp_size=shards, tp_plan="auto")}
    if device is not None and (device.type != "cpu" or quantization):
        options["device_map"] = {"": device}
    return options


@contextmanager
def _explained(source: Source, what: str) -> Iterator[str]:
    """Yields the name that transformers is to load, and turns whatever it raises into one ModelError that names the key.

    Its warnings are silenced meanwhile: what matters of them is checked here.
    """
    from transformers.utils import logging

    name, key = str(source.model), f"{section_name(source)}.model"
    path = Path(name).expanduser()
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if path.is_file():
        raise ModelError(f"{key}: {name} is a file. Give the directory of a Hugging Face model.")
    if looks_local and not path.is_dir():
        raise ModelError(f"{key}: no such directory (found {name!r}). Give a model directory or a hub name.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{key}: {name} has no config.json. Give the directory of a Hugging Face model.")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield str(path) if path.is_dir() else name
    except ModelError:
        raise
    except Exception as error:  # transformers and what it calls raise many types here; all mean "cannot be loaded"
        remedy = _remedy(section_name(source), error, path.is_dir(), what)
        raise ModelError(f"{key} = {name}: the {what} cannot be loaded. {remedy}") from error
    finally:
        logging.set_verbosity(verbosity)


def implementation(attention: str) -> str | None:
    """Translates a value of the key `attention` to the `attn_implementation` of transformers; None lets that choose."""
    return None if attention == "auto" else attention


def check_attention(source: Source, model_config: Any, images: bool = False) -> None:
    """Raises ModelError if the key `attention` asks for sdpa, and transformers has none for this model."""
    mapping = auto_class(images)._model_mapping
    if source.attention != "sdpa" or type(model_config) not in mapping:
        return
    found: Any = mapping[type(model_config)]
    classes = found if isinstance(found, tuple) else (found,)
    if not any(each._supports_sdpa for each in classes):
        raise _no_sdpa(section_name(source), classes[0].__name__)


def _no_sdpa(section: str, name: str) -> ModelError:
    return ModelError(f"{section}.attention = sdpa: transformers has none for {name}; set {section}.attention: auto")


@contextmanager
def explained_attention(attention: str, section: str) -> Iterator[None]:
    """Turns what transformers raises where an attention cannot be had into a ModelError.

    section: teacher or student, whose configuration asks for this attention.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
            raise _no_sdpa(section, str(error).split()[0]) from error
        if "flash" not in attention or "flash" not in str(error).lower():
            raise
        raise ModelError(
            f"{section}.attention = {attention} cannot be used on this machine; set {section}.attention: auto, or install "
            f"flash attention on all machines of the {section} ({shortened(error)})"
        ) from error


def _remedy(section: str, error: Exception, is_local: bool, what: str) -> str:
    """Guesses from an error what the user can do."""
    from huggingface_hub import is_offline_mode

    shown = f"({shortened(error)})"
    lower = " ".join(str(error).split()).lower()
    if not is_local and is_offline_mode() and isinstance(error, OSError):
        return "The hub cannot be reached from here, and it is not in the cache. Give the directory of a model."
    if "backend tokenizer" in lower:
        return "It has no tokenizer.json; save its tokenizer there."
    if is_local and (what == "tokenizer" or isinstance(error, OSError)) and not isinstance(error, ImportError):
        return f"Its files are missing or damaged; download or save the model again. {shown}"
    if isinstance(error, OSError):
        return f"Give an existing model directory, or a hub name this machine can reach or has in its cache. {shown}"
    if isinstance(error, ImportError):
        return f"A package is missing. {shown}"
    if "trust_remote_code" in lower:
        return f"If you trust its authors, set {section}.trust_remote_code: true. {shown}"
    if "tensor parallel" in lower or "tp_plan" in lower or "parallel plan" in lower:
        return f"This architecture cannot be split in transformers; set {section}.shards: 1. {shown}"
    if "unrecognized configuration class" in lower or "does not recognize this architecture" in lower:
        return f"It is not a causal language model that the installed transformers knows. {shown}"
    return shown
