"""Finds the sizes of a model, and the memory of its activations, without its weights.

Sizes come from a model on the meta device. Activations come from one forward and backward pass over tensors that have a
shape but no contents (`FakeTensorMode`): every operation that the real pass would do is seen, so what stays alive for
the backward pass is counted, not estimated, for any architecture.
"""

import copy
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taid_ray.config.models import LoraConfig
from taid_ray.errors import ModelError, shortened
from taid_ray.models.adapters import add_lora
from taid_ray.models.freezing import freeze as freeze_modules
from taid_ray.models.head import hidden_states
from taid_ray.models.student_init import from_architecture
from taid_ray.plan.sizes import Activations, ModelShape


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations under it have made and that are still alive."""

    def __init__(self, known: Iterable[Tensor] = ()):
        """Starts at 0 bytes. known: tensors that are not counted, such as parameters."""
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._add(value.untyped_storage())
        return out

    def restart(self) -> int:
        """Forgets the peak so far and returns the bytes that are alive."""
        self.peak = self.now
        return self.now

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def shape_of(
    model_config: Any,
    lora: LoraConfig | None = None,
    trust_remote_code: bool = False,
    images: bool = False,
    freeze: Sequence[str] = (),
) -> ModelShape:
    """Returns the sizes of the causal language model that a transformers config describes, with adapters if `lora`.

    images: one that is shown images. freeze: names of modules that do not learn, as `student.freeze` has them.
    """
    model_config = copy.deepcopy(model_config)  # transformers notes dtype and attention in it
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = from_architecture(model_config, "eager", 0, trust_remote_code, images=images)
        freeze_modules(model, list(freeze))
        trained_model = add_lora(model, lora, 0) if lora else model
    text, head = model_config.get_text_config(), model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    head_weight = getattr(head, "base_layer", head).weight
    outside = {id(embedding), *(id(p) for p in head.parameters())}
    parameters = list(trained_model.named_parameters())
    trained = [p.numel() for _, p in parameters if p.requires_grad]
    inside = [(name, p) for name, p in parameters if p.dim() >= 2 and id(p) not in outside]
    vision = []
    if images:
        language = {id(p) for p in model.get_decoder().parameters()}
        vision = [p for _, p in inside if id(p) not in language]
        inside = [(name, p) for name, p in inside if id(p) in language]
    heads = getattr(text, "num_attention_heads", 0) or 0
    head_size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return ModelShape(
        parameters=sum(p.numel() for _, p in parameters),
        trained=sum(trained),
        largest=max(trained, default=0),
        matmul=round(sum(p.numel() * _share_used(name, text) for name, p in inside)),
        matmul_trained=round(sum(p.numel() * _share_used(name, text) for name, p in inside if p.requires_grad)),
        layers=text.num_hidden_layers,
        attention_width=heads * head_size,
        hidden_size=head_weight.shape[1],
        head_rows=head_weight.shape[0],
        head_tied=head_weight is embedding,
        head_trained=any(p.requires_grad for p in head.parameters()),
        sizes=tuple(p.numel() for _, p in parameters),
        sharded=_sharded(model),
        vision=sum(p.numel() for p in vision),
        vision_trained=sum(p.numel() for p in vision if p.requires_grad),
    )


def _share_used(name: str, text: Any) -> float:
    """Returns the part of a parameter that one token meets: chosen over all experts, or all of it."""
    chosen = getattr(text, "num_experts_per_tok", None)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    experts = experts or getattr(text, "n_routed_experts", None)
    return chosen / experts if chosen and experts and ".experts." in name else 1.0


def _sharded(model: Any) -> int:
    """Counts the elements of the parameters that the architecture's tensor-parallel plan splits."""
    total = 0
    plan = getattr(model, "tp_plan", None) or {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", module), "")
        if "colwise" in style or ("rowwise" in style and kind == "weight"):
            total += parameter.numel()
    return total


@dataclass(frozen=True)
class Pass:
    """A forward pass, and with `learns` a backward pass, over [rows, length] tokens."""

    rows: int
    length: int
    dtype: torch.dtype
    attention: str
    checkpointing: bool = False
    lora: LoraConfig | None = None
    learns: bool = True
    trust_remote_code: bool = False
    key: str = "student.model"
    """Configuration key of the model, for errors."""
    images: bool = False
    """The model is one that is shown images."""
    freeze: tuple[str, ...] = ()
    """As in `shape_of`."""


def trace(model_config: Any, traced: Pass) -> Activations:
    """Counts what a pass keeps alive, gradients of parameters left out. Takes seconds for tens of layers of any size.

    Of a model that is shown images its language model alone: see `trace_tower`. Raises ModelError for an architecture whose
    code looks at the values of its tensors.
    """

    def forward(model: Any) -> Tensor:
        inputs = {
            "input_ids": torch.zeros(traced.rows, traced.length, dtype=torch.int64),
            "position_ids": torch.arange(traced.length).expand(traced.rows, -1),
        }
        return hidden_states(model, inputs)

    try:
        return _traced(model_config, traced, forward)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{traced.key}: the memory of {type(model_config).__name__} cannot be found out without running it "
            f"({shortened(error)}); choose another architecture to plan with"
        ) from error


def trace_tower(model_config: Any, traced: Pass, pixels: Mapping[str, Tensor]) -> Activations | None:
    """Counts what a pass of images through the vision tower, up to the language model, keeps alive, pixels included.

    pixels: the tensors that the model takes for the images of all rows; their values do not matter. Returns None for a family
    whose code looks at values, such as the sizes of images, so that it cannot be traced.
    """

    def forward(model: Any) -> Tensor:
        made = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in pixels.items()}
        features = model.base_model.get_image_features(**made).pooler_output
        return torch.cat([each.flatten() for each in tree_leaves(features)])

    try:
        return _traced(model_config, traced, forward)
    except (RuntimeError, TypeError, ValueError):
        return None


def _traced(model_config: Any, traced: Pass, forward: Callable[[Any], Tensor]) -> Activations:
    """Counts what `forward` keeps alive on the model of a pass."""
    # flash attention keeps what sdpa keeps, and need not be installed here
    attention = "sdpa" if "flash" in traced.attention else traced.attention
    with warnings.catch_warnings(action="ignore"):
        with torch.device("meta"):
            model = from_architecture(
                copy.deepcopy(model_config), attention, 0, traced.trust_remote_code, images=traced.images
            )
            freeze_modules(model, list(traced.freeze))
            if traced.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            whole = add_lora(model, traced.lora, 0) if traced.lora else model
        with FakeTensorMode():
            _leave_meta(whole.train(traced.learns), traced.dtype)
            return _count(whole, lambda: forward(model), traced.learns)


def _leave_meta(model: Any, dtype: torch.dtype) -> None:
    """Puts tensors without contents of this mode's CPU in the place of those on the meta device. Tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in [(name, p) for name, p in module._parameters.items() if p is not None]:
            made.setdefault(
                id(old), torch.nn.Parameter(torch.empty(old.shape, dtype=dtype, device="cpu"), old.requires_grad)
            )
            module._parameters[name] = made[id(old)]
        for name, buffer in [(name, b) for name, b in module._buffers.items() if b is not None]:
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _count(whole: Any, forward: Callable[[], Tensor], learns: bool) -> Activations:
    for parameter in whole.parameters():
        if not learns:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget)
    live = LiveBytes([*whole.parameters(), *whole.buffers()])
    with live:
        hidden = forward()
        forward_peak = live.peak
        saved = live.restart()
        if learns and hidden.requires_grad:
            hidden.backward(torch.empty_like(hidden))
    return Activations(saved, forward_peak, live.peak)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None
