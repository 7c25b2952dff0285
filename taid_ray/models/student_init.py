"""Where the student's weights come from (loaded, new, or cut out of the teacher) and how they leave (merged)."""

import copy
import warnings
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from taid_ray.config.schema import DistillConfig, LoraConfig, StudentConfig, TeacherConfig
from taid_ray.errors import ConfigError, ModelError
from taid_ray.models.loading import explained_attention, load_causal_lm, load_generation_config, load_model_config
from taid_ray.models.vocabulary import Vocabulary

SAMPLING_VALUES = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def build_student(config: DistillConfig, vocabulary: Vocabulary | None) -> Any:
    """The student before training, float32 on CPU. A pure function of the config, so every rank builds the same.

    vocabulary: what `student.resize_to_teacher` goes by; without it the embedding is left as it is.
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
            with explained_attention(student.attention, "student"):
                model = from_architecture(
                    student_model_config(config), student.attention, config.train.seed, origin(config).trust_remote_code
                )
        case "cut":
            model = cut_layers(config)
    if vocabulary is not None and student.resize_to_teacher:
        resize_with_mean(model, vocabulary)
    if has_teacher_tokenizer(config):
        take_token_ids(model, config)
    return model


def origin(config: DistillConfig) -> StudentConfig | TeacherConfig:
    """The section whose model, revision and code the student's architecture comes from."""
    return config.teacher if config.student.model is None else config.student


def has_teacher_tokenizer(config: DistillConfig) -> bool:
    """Whether data are encoded, and the student is saved, with the teacher's tokenizer."""
    return config.student.model is None or config.student.resize_to_teacher


def _architecture(config: DistillConfig) -> Any:
    """The transformers config that the student's is made from."""
    source = origin(config)
    return load_model_config(
        str(source.model),
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        key="teacher.model" if source is config.teacher else "student.model",
    )


def student_model_config(config: DistillConfig) -> Any:
    """The transformers config of the student as it will be built (before any resize)."""
    student, result = config.student, _architecture(config)
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
        _keep_layers(result.get_text_config(), student.layers or [])
    return result


def check_student(config: DistillConfig, model_config: Any) -> None:
    """Builds a student of other shape, or with adapters, without its weights, to see that it can be built.

    Raises ConfigError or ModelError.
    """
    student, remote_code = config.student, origin(config).trust_remote_code
    if student.init == "pretrained" and student.lora is None:
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
            model = from_architecture(model_config, attention, 0, remote_code)
        except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError, StrictDataclassError) as error:
            raise ConfigError(
                f"{key}: no {type(model_config).__name__} model can be built with {value} "
                f"({' '.join(str(error).split())[:200]})"
            ) from None
        if student.init == "cut":
            teacher = from_architecture(_architecture(config), attention, 0, remote_code)
            _kept_state(teacher, model, student.layers or [])
        if student.lora is not None:
            add_lora(model, student.lora, 0)


def _keep_layers(model_config: Any, layers: list[int]) -> None:
    """Cuts num_hidden_layers, and every per-layer list of a transformers (text) config, down to `layers` in place.

    Raises ConfigError for a layer that is not there, ModelError if the config cannot describe these layers alone.
    """
    depth = model_config.num_hidden_layers
    wrong = [layer for layer in layers if layer >= depth]
    if wrong:
        raise ConfigError(f"student.layers: the teacher has layers 0 to {depth - 1} (found {wrong}); leave those out")
    if layers == list(range(depth)):
        return
    if getattr(model_config, "is_heterogeneous", False):
        raise _not_cuttable(model_config, "its per_layer_config is by number of layer")
    changed: dict[str, Any] = {"num_hidden_layers": len(layers)}
    for key, value in vars(model_config).items():
        if not isinstance(value, list | tuple) or key.startswith("_"):
            continue
        if "token" in key or key in ("architectures", "bad_words_ids"):
            continue
        numbers = _numbers_layers(key, list(value), depth)
        if numbers and len(value) < depth:
            raise _not_cuttable(model_config, f"its {key} numbers layers ({list(value)})")
        if numbers:
            changed[key] = type(value)(range(len(layers)))
        elif len(value) == depth:
            changed[key] = type(value)(value[layer] for layer in layers)
    try:
        for key, value in changed.items():
            setattr(model_config, key, value)
        # as RUN/model/config.json will be read
        again = type(model_config).from_dict(model_config.to_dict())
        lost = [key for key, value in changed.items() if getattr(again, key) != value]
    except (TypeError, ValueError, LookupError, RuntimeError, StrictDataclassError) as error:
        raise _not_cuttable(model_config, " ".join(str(error).split())[:200]) from None
    if lost:
        raise _not_cuttable(model_config, f"its {lost[0]} is derived from other fields")


def _numbers_layers(key: str, value: list[Any], depth: int) -> bool:
    """Whether a list of a config names layers by their numbers, instead of saying one thing about each.

    A list as long as the model is one such only if it counts all layers (0, 1 alone may as well be two flags).
    """
    named = "layer" in key or key.endswith(("idxs", "indices", "indexes"))
    ascending = all(type(x) is int and 0 <= x < depth for x in value) and value == sorted(set(value))
    return named and ascending and len(value) > 0 and (len(value) < depth or depth > 2)


def _not_cuttable(model_config: Any, why: str) -> ModelError:
    return ModelError(
        f"teacher.model: {type(model_config).__name__} cannot describe a model of only some of the teacher's layers: "
        f"{why}; set student.init to pretrained or scratch"
    )


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
        attention="eager",  # only its weights are used
        trust_remote_code=config.teacher.trust_remote_code,
        key="teacher.model",
    )
    with explained_attention(config.student.attention, "student"):
        student = from_architecture(
            student_model_config(config), config.student.attention, config.train.seed, config.teacher.trust_remote_code
        )
    student.load_state_dict(_kept_state(teacher, student, config.student.layers or []))
    student.generation_config = teacher.generation_config
    return student


def _kept_state(teacher: Any, student: Any, layers: list[int]) -> dict[str, Tensor]:
    """The teacher's state with its `layers` only, numbered anew. Raises ModelError unless it fits the student."""
    stack, state = _layer_stack(teacher), teacher.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(f"{stack}.")}
    for new, old in enumerate(layers):
        prefix = f"{stack}.{old}."
        kept |= {f"{stack}.{new}.{name[len(prefix) :]}": state[name] for name in state if name.startswith(prefix)}
    have, need = ({(name, tensor.shape) for name, tensor in each.items()} for each in (kept, student.state_dict()))
    if have != need:
        names = sorted({name for name, _ in have ^ need})
        raise ModelError(
            f"student.layers: {layers} gives no {type(student).__name__}, whose layers differ by their place "
            f"({len(names)} parameters do not fit, for example {names[0]}); choose other layers, or set student.init to "
            "pretrained or scratch"
        )
    return kept


def _layer_stack(model: Any) -> str:
    """Name of the ModuleList that holds the decoder layers."""
    depth = model.config.get_text_config().num_hidden_layers
    decoder = set(model.get_decoder().modules())  # an image encoder may be as deep
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and module in decoder:
            return name
    raise ModelError(
        f"teacher.model: {type(model).__name__} keeps its {depth} layers in no single list, so student.init: cut cannot "
        "take some of them; set student.init to pretrained or scratch"
    )


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
    teacher, rows = config.teacher, model.get_input_embeddings().weight.shape[0]
    teacher_config = load_model_config(teacher.model, teacher.revision, teacher.trust_remote_code, key="teacher.model")
    generation = load_generation_config(teacher.model, teacher.revision, teacher_config)
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


def without_idle_sampling(generation_config: Any) -> Any:
    """A copy that transformers agrees to save: some checkpoints name sampling values that their greedy decoding ignores."""
    result = copy.deepcopy(generation_config)
    if result is not None and not result.do_sample:
        for key in SAMPLING_VALUES:
            setattr(result, key, None)
    return result


def merged_model(config: DistillConfig, source: Any, state: dict[str, Tensor]) -> Any:
    """A plain transformers model on CPU with the trained weights `state`, adapters merged, in the student's dtype.

    source: the model that was trained, for its config; its own weights may be partitioned.
    """
    model = from_architecture(
        copy.deepcopy(source.config), "eager", config.train.seed, origin(config).trust_remote_code
    )
    model.generation_config = without_idle_sampling(source.generation_config)
    lora = config.student.lora
    trained = add_lora(model, lora, config.train.seed) if lora else model
    missing, unexpected = trained.load_state_dict(state, strict=False)
    keys = (model._tied_weights_keys or ()) if model.config.get_text_config().tie_word_embeddings else ()
    tied = {f"{prefix}{key}" for prefix in ("", "base_model.model.") for key in keys}
    assert not unexpected and not set(missing) - tied, (missing, unexpected)
    merged = trained.merge_and_unload() if lora else model
    return merged.to(getattr(torch, config.student.dtype))
