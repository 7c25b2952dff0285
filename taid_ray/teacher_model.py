"""The frozen teacher in one process (or one shard of it), and what a student worker needs of any teacher."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from taid_ray.batch import Batch
from taid_ray.chunked import LogitTransform
from taid_ray.config import TeacherConfig
from taid_ray.errors import ModelError, TeacherError
from taid_ray.models import Head, check_packing, head_of, hidden_states, load_causal_lm, probe_inputs, self_test
from taid_ray.wire import pack

LOGIT_ROWS = 1024
"""Positions whose float32 logits exist at once with payload `logits`."""


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's answer for the N loss positions of a batch."""

    values: Tensor
    """[N, H] hidden states or [N, num_shared] logits, in the teacher's dtype."""
    kind: Literal["hidden", "logits"]

    @property
    def num_bytes(self) -> int:
        return self.values.numel() * self.values.element_size()


@dataclass(frozen=True)
class TeacherInfo:
    """What identifies a loaded teacher. Equal for all replicas of a pool, `probe_digest` possibly excepted."""

    fingerprint: str
    """SHA-256 of architecture, precision, shared rows, payload and a sample of all weights (of one shard, if split)."""
    probe_digest: str
    """SHA-256 of the bits of the hidden states on a fixed probe; differs between kinds of hardware."""
    head_digest: str
    """SHA-256 of the head's shared rows (and bias)."""
    dtype: str
    """Of the hidden states and logits it sends, for example bfloat16."""
    hidden_size: int
    num_parameters: int
    vocab_rows: int
    """Rows of the whole head."""
    num_shared: int
    """Rows that are used: the ids shared with the student."""
    payload: Literal["hidden", "logits"]
    transform: LogitTransform
    has_bias: bool
    dropped_mass: float
    """Mean probability on ids >= num_shared, on the probe."""
    packing_error: str | None
    """Why packed rows must not be sent to this teacher; None if they may."""

    def require_packing(self) -> None:
        """Raises ModelError if packed rows must not be sent to this teacher."""
        if self.packing_error:
            raise ModelError(f"teacher.model: {self.packing_error}")


class TeacherClient(Protocol):
    """A teacher as a student worker sees it. Requests are pure: any of them may be computed again."""

    tokens: int
    """Total positions the teacher was asked to compute (rows x length)."""

    def submit(self, batch: Batch) -> Any:
        """Starts a request and returns at once."""

    def collect(self, request: Any) -> TeacherOutput:
        """Waits for the answer. Raises TeacherError if there is none."""

    def head(self) -> Head:
        """The head's shared rows."""

    def info(self) -> TeacherInfo: ...

    def close(self) -> None: ...


class TeacherModel:
    """A frozen teacher that scores batches deterministically."""

    def __init__(self, config: TeacherConfig, num_shared: int, device: torch.device, leader: bool = True):
        """Loads and tests the model. With config.shards > 1 all processes of the group construct it together.

        leader: False for the shards whose answers nobody reads; they keep no whole head.
        Raises ModelError if the model cannot be used, TeacherError if it is not deterministic.
        """
        self._config, self._device = config, device
        self._model = load_causal_lm(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            attention=config.attention,
            trust_remote_code=config.trust_remote_code,
            quantization=config.quantization,
            shards=config.shards,
            device=device,
            key="teacher.model",
        ).requires_grad_(False)
        whole = head_of(self._model)
        self._vocab_rows, self._dtype = whole.weight.shape[0], whole.weight.dtype
        if num_shared > self._vocab_rows:
            raise ModelError(
                f"teacher.model = {config.model} has {self._vocab_rows} vocabulary rows, fewer than the {num_shared} ids "
                "it is to share with the student; choose a teacher that was trained with this tokenizer"
            )
        self._width = whole.weight.shape[1] if config.payload == "hidden" or not leader else num_shared
        logits = self_test(self._model, whole)
        self._head: Head | None = whole.rows(num_shared) if leader else None
        if self._head is not None and config.shards > 1 and config.payload == "hidden":
            self._head = self._head.to(torch.device("cpu"))  # a gathered copy that is only sent away
        answer = self._check_deterministic()
        packing_error = _packing_error(self._model)
        if leader:
            self._info = self._describe(answer, logits, packing_error)

    @property
    def model(self) -> Any:
        """The transformers model, for what scoring does not offer (text generation)."""
        return self._model

    @torch.no_grad()  # not inference_mode: its tensors may not be saved for a student's backward pass
    def score(self, inputs: dict[str, Tensor], loss_positions: Tensor) -> Tensor:
        """[N, H] hidden states or [N, num_shared] logits at the loss positions, on the teacher's device.

        inputs: [B, T] each, padded on the right with continuing position_ids. loss_positions: [N], ascending, into
        B * T. Rows are split in order by config.max_tokens, a function of this request alone, so that the same request
        always gives the same bits. Collective for a tensor-parallel teacher. Raises TeacherError for impossible ids.
        """
        self.check_request(inputs, loss_positions)
        rows, length = inputs["input_ids"].shape
        step = max(1, self._config.max_tokens // length)
        parts = [torch.empty(0, self._width, dtype=self._dtype, device=self._device)]
        for start in range(0, rows, step):
            first, last = start * length, min(start + step, rows) * length
            chosen = loss_positions[(loss_positions >= first) & (loss_positions < last)] - first
            if len(chosen):
                chunk = {name: tensor[start : start + step].to(self._device) for name, tensor in inputs.items()}
                hidden = hidden_states(self._model, chunk).flatten(0, 1)[chosen.to(self._device)]
                parts.append(self._payload(hidden))
        return torch.cat(parts)

    def check_request(self, inputs: dict[str, Tensor], loss_positions: Tensor) -> None:
        """Raises TeacherError for ids or positions that do not exist: on a GPU they would take the process down."""
        ids = inputs["input_ids"]
        if ids.ndim != 2 or not ids.numel():
            raise TeacherError(
                f"a request must hold [rows, length] input_ids, not empty (found shape {tuple(ids.shape)})"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_rows:
            raise TeacherError(
                f"input ids must lie in 0 to {self._vocab_rows - 1} (found {low} to {high}); check the tokenizer"
            )
        if len(loss_positions) and not 0 <= int(loss_positions.min()) <= int(loss_positions.max()) < ids.numel():
            raise TeacherError(
                f"loss positions must lie in 0 to {ids.numel() - 1} (found up to {int(loss_positions.max())})"
            )

    def head(self) -> Head:
        """The head's first num_shared rows. Of the leader only."""
        assert self._head is not None
        return self._head

    def info(self) -> TeacherInfo:
        """Of the leader only."""
        return self._info

    def _payload(self, hidden: Tensor) -> Tensor:
        if self._config.payload == "hidden" or self._head is None:
            return hidden
        return torch.cat([self._head.logits(part).to(self._dtype) for part in hidden.split(LOGIT_ROWS)])

    def _check_deterministic(self) -> Tensor:
        """Scores the probe twice and returns the answer. Raises TeacherError unless the bits are the same."""
        inputs = probe_inputs(self._vocab_rows, self._device)
        positions = torch.arange(inputs["input_ids"].numel(), device=self._device)
        first, second = self.score(inputs, positions), self.score(inputs, positions)
        if not torch.equal(first, second):
            raise TeacherError(
                f"teacher.model = {self._config.model} is not deterministic: scoring the probe twice gave answers that "
                f"differ by up to {float((first.float() - second.float()).abs().max()):.1e}; try teacher.attention: eager"
            )
        return first

    def _describe(self, answer: Tensor, logits: Tensor, packing_error: str | None) -> TeacherInfo:
        """logits: the model's own on the probe, all rows."""
        model, config, head = self._model, self._config, self.head()
        num_shared = head.weight.shape[0]
        return TeacherInfo(
            fingerprint=_fingerprint(model, num_shared, config.payload),
            probe_digest=_digest(answer),
            head_digest=head_digest(head),
            dtype=str(self._dtype).removeprefix("torch."),
            hidden_size=head.weight.shape[1],
            num_parameters=model.num_parameters(),
            vocab_rows=self._vocab_rows,
            num_shared=num_shared,
            payload=config.payload,
            transform=head.transform,
            has_bias=head.bias is not None,
            dropped_mass=float(logits.float().softmax(-1)[..., num_shared:].sum(-1).mean()),
            packing_error=packing_error,
        )


class LocalTeacher:
    """A TeacherClient in the same process. Computes when an answer is collected, so nothing is held in between."""

    def __init__(self, config: TeacherConfig, num_shared: int, device: torch.device):
        self._model, self._kind = TeacherModel(config, num_shared, device), config.payload
        self.tokens = 0

    def submit(self, batch: Batch) -> Batch:
        return batch

    def collect(self, request: Batch) -> TeacherOutput:
        output = TeacherOutput(self._model.score(request.inputs, request.loss_positions), self._kind)
        check_finite(output.values, output.kind)
        self.tokens += request.inputs["input_ids"].numel() if request.num_loss_tokens else 0
        return output

    def head(self) -> Head:
        return self._model.head()

    def info(self) -> TeacherInfo:
        return self._model.info()

    def close(self) -> None:
        pass


def check_finite(values: Tensor, kind: str) -> None:
    """Raises TeacherError if an answer holds NaN or, but for logits of -inf, an infinity."""
    fine = torch.isfinite(values) if kind == "hidden" else values < float("inf")
    if not bool(fine.all()):
        raise TeacherError(
            f"the teacher's {kind} values are not finite at {int((~fine).any(-1).sum())} of {len(values)} positions; "
            "set teacher.dtype to bfloat16 or float32, or check the checkpoint"
        )


def head_digest(head: Head) -> str:
    """SHA-256 of the bytes of weight and bias."""
    return _digest(head.weight, *([] if head.bias is None else [head.bias]))


def _digest(*tensors: Tensor) -> str:
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(pack(tensor)[2].data)
    return result.hexdigest()


def _packing_error(model: Any) -> str | None:
    try:
        check_packing(model)
    except ModelError as error:
        return str(error)
    return None


def _fingerprint(model: Any, num_shared: int, payload: str) -> str:
    """Hashes the model's config and four values of every parameter, of this process's part if it is sharded."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "distributed_config")}
    result = hashlib.sha256(json.dumps([config, num_shared, payload], sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        flat = local.detach().flatten()
        chosen = torch.linspace(0, max(0, flat.numel() - 1), 4).long().to(flat.device)
        result.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        result.update(pack(flat[chosen] if flat.numel() else flat)[2].data)
    return result.hexdigest()
