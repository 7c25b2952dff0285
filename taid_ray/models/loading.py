"""Loading Hugging Face causal language models, their configs and tokenizers, with errors that name the configuration key."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from taid_ray.errors import ModelError


def load_model_config(name: str, revision: str | None = None, trust_remote_code: bool = False, *, key: str) -> Any:
    """The transformers config of a model. `key` is the configuration key that named it, for error messages.

    Raises ModelError if there is no such model.
    """
    from transformers import AutoConfig

    with _explained(key, name, "configuration") as source:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, key: str = "teacher.model"
) -> Any:
    """The tokenizer of a model. Raises ModelError if there is none."""
    from transformers import AutoTokenizer

    with _explained(key, name, "tokenizer") as source:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def load_generation_config(name: str, revision: str | None, model_config: Any) -> Any:
    """The generation settings of a model; where it has none of its own, those that its config implies."""
    from transformers import GenerationConfig

    path = Path(name).expanduser()
    try:
        return GenerationConfig.from_pretrained(str(path) if path.is_dir() else name, revision=revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(model_config)


def check_causal_lm(model_config: Any, key: str) -> None:
    """Raises ModelError if transformers has no causal language model for this config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own_code = "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {})
    if not own_code and type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{key}: a {model_config.model_type} model is no causal language model. Choose another one.")


def check_divisible(model_config: Any, shards: int, key: str) -> None:
    """Raises ModelError if the model's attention heads cannot be dealt out evenly to `shards` processes."""
    text = model_config.get_text_config()
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, field, None) or shards
        if heads % shards:
            raise ModelError(
                f"{_section(key)}.shards = {shards} does not divide the model's {field} = {heads}; "
                "choose a number that does"
            )


def check_weights(name: str, key: str) -> None:
    """Raises ModelError unless a local model directory holds all its weights, by the headers of its safetensors files.

    Says nothing about a model of the hub, whose downloads the hub's client checks.
    """
    from safetensors import SafetensorError, safe_open

    directory = Path(name).expanduser()
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not directory.is_dir() or any(directory.glob("pytorch_model*.bin")):
        return
    again = "Download or save the model again."
    if not single.is_file() and not index.is_file():
        raise ModelError(f"{key}: {name} holds no weights (model.safetensors). {again}")
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
        raise ModelError(f"{key}: {file} is damaged or only half there ({_one_line(error)}). {again}") from None
    if missing:
        raise ModelError(
            f"{key}: {name} lacks {len(missing)} of {len(wanted)} weight files, for example {missing[0]}. {again}"
        )


def load_causal_lm(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    quantization: dict[str, Any] | None = None,
    shards: int = 1,
    device: torch.device | None = None,
    *,
    key: str = "teacher.model",
) -> Any:
    """A causal language model in eval mode, on CPU unless `device` says otherwise.

    attention: as transformers names it; the flash ones need the package flash-attn and a GPU. shards > 1: this process's
    part of a tensor-parallel model; all `shards` processes of an initialised process group must call it together.
    Raises ModelError if there is no such model, its architecture or a setting is not supported, or the checkpoint lacks
    weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # taid-ray reports progress itself, and actors' bars would mix with it
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if quantization:
        options["quantization_config"] = quantization
    if shards > 1:
        from transformers.distributed import DistributedConfig

        check_divisible(load_model_config(name, revision, trust_remote_code, key=key), shards, key)
        options["distributed_config"] = DistributedConfig(tp_size=shards, tp_plan="auto")
    elif device is not None and (device.type != "cpu" or quantization):
        options["device_map"] = {"": device}
    with _explained(key, name, "model") as source, explained_attention(attention, _section(key)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with a message of our own
            **options,
        )
    model, loading = loaded
    if loading["missing_keys"] or loading["mismatched_keys"]:
        absent = sorted([*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])])
        raise ModelError(
            f"{key} = {name}: the checkpoint has no weights that fit {len(absent)} parameters of "
            f"{type(model).__name__} ({', '.join(absent[:3])} ...); name a complete causal language model"
        )
    return model.eval()


@contextmanager
def _explained(key: str, name: str, what: str) -> Iterator[str]:
    """Yields what transformers is to load, and turns whatever it raises into one ModelError that names the key.

    Its warnings are silenced meanwhile: what matters of them is checked here.
    """
    from transformers.utils import logging

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
        remedy = _remedy(_section(key), error, path.is_dir(), what)
        raise ModelError(f"{key} = {name}: the {what} cannot be loaded. {remedy}") from error
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def explained_attention(attention: str, section: str) -> Iterator[None]:
    """Turns what transformers raises where a flash attention cannot be had into a ModelError.

    section: teacher or student, whose configuration asks for this attention.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        if "flash" not in attention or "flash" not in str(error).lower():
            raise
        raise ModelError(
            f"{section}.attention = {attention} cannot be used on this machine; set {section}.attention: sdpa, or install "
            f"flash attention on all machines of the {section} ({_one_line(error)})"
        ) from error


def _section(key: str) -> str:
    return key.rpartition(".")[0] or key


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def _remedy(section: str, error: Exception, is_local: bool, what: str) -> str:
    from huggingface_hub import is_offline_mode

    shown = f"({_one_line(error)})"
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
    if "sdpa" in lower or "scaled_dot_product" in lower:
        return f"Set {section}.attention: eager. {shown}"
    if "unrecognized configuration class" in lower or "does not recognize this architecture" in lower:
        return f"It is no causal language model that the installed transformers knows. {shown}"
    return shown
