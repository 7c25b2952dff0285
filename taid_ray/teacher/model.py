"""The frozen teacher in one process, or one shard of it: loading, tests, and scoring of batches."""

import hashlib
import json
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from taid_ray.config.models import TeacherConfig
from taid_ray.errors import ModelError, TeacherError
from taid_ray.models.head import Head, head_of, hidden_states
from taid_ray.models.isolation import check_packing, check_probe
from taid_ray.models.lengths import chunk_length, context_length, uniform_length
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.probes import PROBE_LENGTH, Probe, long_probe, probe_inputs, probe_of
from taid_ray.models.self_test import explained_tests, self_test
from taid_ray.teacher.payload import bytes_per_token, check_topk, encode, measured_error, needs_head
from taid_ray.teacher.protocol import TeacherInfo
from taid_ray.teacher.wire import pack

PADDING_LIMIT = 256
"""Padding (positions) one forward pass may hold. A pass of fewer positions than this costs a GPU about as much as one
with these many, because it spends its time on reading the weights; so more padding than this is worth a second pass."""
SUMS = 1021
"""A prime, so that two rows of a matrix that change places change the sums."""


class TeacherModel:
    """A frozen teacher that scores batches deterministically."""

    def __init__(self, config: TeacherConfig, num_shared: int, device: torch.device, leader: bool = True):
        """Loads and tests the model. With config.shards > 1 all processes of the group construct it together.

        leader: False for the shards whose answers nobody reads; they keep no whole head.
        Raises ConfigError or ModelError if the model cannot be used so, TeacherError if it is not deterministic.
        """
        if config.payload == "topk":
            check_topk(config.topk, num_shared)
        self._config, self._device = config, device
        self._model = load_causal_lm(config, device=device).requires_grad_(False)
        whole = head_of(self._model)
        self._vocab_rows, self._num_shared, self._dtype = whole.weight.shape[0], num_shared, whole.weight.dtype
        if num_shared > self._vocab_rows:
            raise ModelError(
                f"teacher.model = {config.model} has {self._vocab_rows} vocabulary rows, fewer than the {num_shared} ids "
                "it is to share with the student; choose a teacher that was trained with this tokenizer"
            )
        self._hidden_size = whole.weight.shape[1]
        with explained_tests(self._model, "teacher.model", config.shards > 1):
            logits = self_test(self._model, whole, "teacher")
            probe = probe_of(self._model, whole, "teacher")
            longest = self._longest_probe()
            check_probe(probe, packed=False, longest=longest)
            packing_error = _packing_error(probe, {PROBE_LENGTH, longest})
        self._head: Head | None = whole.rows(num_shared) if leader else None
        if self._head is not None and config.shards > 1 and needs_head(config.payload):
            self._head = self._head.to(torch.device("cpu"))  # a gathered copy that is only sent away
        answer = self._check_deterministic()
        fingerprint = _fingerprint(self._model, num_shared, config)
        if leader:
            self._info = self._describe(fingerprint, answer, logits, packing_error)

    @property
    def model(self) -> Any:
        """The transformers model, for what `score` does not offer (text generation)."""
        return self._model

    def score(self, inputs: dict[str, Tensor], loss_positions: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes the payload's tensors (see payload) at the loss positions, on the teacher's device; {} but for the leader.

        inputs: [B, T] each, padded on the right with continuing position_ids. loss_positions: [N], ascending, into
        B * T. labels: [N], the ids they predict, which only payload topk looks at. What is computed together is a
        function of this request alone, so that the same request always gives the same bits. Collective for a
        tensor-parallel teacher. Raises TeacherError for impossible ids.
        """
        self.check_request(inputs, loss_positions, labels)
        hidden = self._hidden(inputs, loss_positions)
        if self._head is None:
            return {}
        return encode(self._config.payload, hidden, self._head, labels.to(self._device), self._config.topk)

    def payload_error(self, inputs: dict[str, Tensor], loss_positions: Tensor) -> float:
        """Measures what the payload loses on average over the loss positions, see payload.measured_error; 0.0 if exact.

        Arguments and errors as in `score`. The leader calls it while the other shards of a tensor-parallel teacher `score`.
        """
        self.check_request(inputs, loss_positions)
        hidden, config = self._hidden(inputs, loss_positions), self._config
        return measured_error(config.payload, hidden, self.head().to(self._device), config.topk)

    def check_request(self, inputs: dict[str, Tensor], loss_positions: Tensor, labels: Tensor | None = None) -> None:
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
        if labels is not None:
            self._check_labels(labels, len(loss_positions))

    def head(self) -> Head:
        """Returns the head's first num_shared rows. Only the leader has them."""
        assert self._head is not None
        return self._head

    def info(self) -> TeacherInfo:
        """Returns what identifies the teacher. Only the leader knows it."""
        return self._info

    def _check_labels(self, labels: Tensor, num_positions: int) -> None:
        if labels.shape != (num_positions,):
            raise TeacherError(
                f"a request must hold one label per loss position (found {tuple(labels.shape)} for {num_positions})"
            )
        if self._config.payload == "topk" and num_positions:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self._num_shared:
                raise TeacherError(
                    f"labels must lie in 0 to {self._num_shared - 1} (found {low} to {high}); check the tokenizer"
                )

    def _longest_probe(self) -> int:
        """Length of the longest rows to try, in positions; two of them are computed at once."""
        model = self._model.config
        # No longer row is packed where chunks are shorter than rows, see lengths.check_lengths.
        return long_probe(self._device, context_length(model), chunk_length(model), self._config.max_tokens // 2)

    @torch.no_grad()  # not inference_mode: its tensors may not be saved for a student's backward pass
    def _hidden(self, inputs: dict[str, Tensor], loss_positions: Tensor) -> Tensor:
        """Computes the hidden states [N, H] at the loss positions, in their order."""
        rows, length = inputs["input_ids"].shape
        row, column = loss_positions // length, loss_positions % length
        # A causal model never looks beyond a row's last loss position.
        used = torch.zeros(rows, dtype=torch.int64).scatter_reduce_(0, row, column + 1, "amax")
        result = torch.empty(len(loss_positions), self._hidden_size, dtype=self._dtype, device=self._device)
        for group in micro_batches(used.tolist(), self._config.max_tokens):
            chosen, longest = torch.tensor(group), int(used[group[0]])
            place = torch.full((rows,), -1).scatter_(0, chosen, torch.arange(len(group)))[row]
            here = (place >= 0).nonzero().flatten()
            cut = {name: tensor[chosen, :longest].to(self._device) for name, tensor in inputs.items()}
            wanted = (place[here] * longest + column[here]).to(self._device)
            result[here.to(self._device)] = hidden_states(self._model, cut).flatten(0, 1)[wanted]
        return result

    def _check_deterministic(self) -> dict[str, Tensor]:
        """Scores the probe twice and returns the answer. Raises TeacherError unless the bits are the same."""
        inputs = probe_inputs(self._vocab_rows, self._device)
        positions = torch.arange(inputs["input_ids"].numel())
        first, second = (self.score(inputs, positions, torch.zeros_like(positions)) for _ in range(2))
        for name in first:
            if _digest(first[name]) != _digest(second[name]):
                difference = float((first[name].float() - second[name].float()).abs().max())
                raise TeacherError(
                    f"teacher.model = {self._config.model} is not deterministic: scoring the probe twice gave {name} that "
                    f"differ by up to {difference:.1e}; try teacher.attention: eager"
                )
        return first

    def _describe(
        self, fingerprint: str, answer: dict[str, Tensor], logits: Tensor, packing_error: str | None
    ) -> TeacherInfo:
        """Returns what identifies the teacher. answer: to the probe; logits: the model's own on the probe, all rows."""
        model, config, head = self._model, self._config, self.head()
        num_shared, hidden_size = head.weight.shape
        return TeacherInfo(
            fingerprint=fingerprint,
            probe_digest=_digest(*answer.values()),
            head_digest=head_digest(head),
            dtype=str(self._dtype).removeprefix("torch."),
            hidden_size=hidden_size,
            num_parameters=model.num_parameters(),
            vocab_rows=self._vocab_rows,
            num_shared=num_shared,
            payload=config.payload,
            topk=config.topk,
            bytes_per_token=bytes_per_token(config.payload, hidden_size, num_shared, config.topk, self._dtype.itemsize),
            transform=head.transform,
            has_bias=head.bias is not None,
            dropped_mass=float(logits.float().softmax(-1)[..., num_shared:].sum(-1).mean()),
            packing_error=packing_error,
        )


def micro_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yields groups of row numbers to compute together, longest row first, so that little is spent on padding.

    lengths: of the part of each row that matters; rows of 0 are left out. A group's rows x longest is at most max_tokens
    (unless it is one row), of which at most PADDING_LIMIT positions are padding.
    """
    group: list[int] = []
    padding = 0
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row]):
        longest = lengths[group[0]] if group else lengths[row]
        padding += longest - lengths[row]
        if group and ((len(group) + 1) * longest > max_tokens or padding > PADDING_LIMIT):
            yield group
            group, padding = [], 0
        group.append(row)
    if group:
        yield group


def head_digest(head: Head) -> str:
    """Returns the SHA-256 of the bytes of weight and bias."""
    return _digest(head.weight, *([] if head.bias is None else [head.bias]))


def _digest(*tensors: Tensor) -> str:
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(pack(tensor)[2].data)
    return result.hexdigest()


def _packing_error(probe: Probe, lengths: Set[int]) -> str | None:
    try:
        for length in sorted(lengths):
            check_packing(probe, length)
    except ModelError as error:
        return str(error)
    return None


def _fingerprint(model: Any, num_shared: int, teacher: TeacherConfig) -> str:
    """Hashes the model's config, what is sent of its answers, and sums over the bits of every whole parameter.

    The same however the model is split. Collective for a tensor-parallel teacher, which gathers one parameter at a time.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "distributed_config")}
    if uniform_length(model.config) is not None:
        # Before rows were kept that short, what a cache holds may depend on the rows that were computed with a sample.
        config["longest_row"] = uniform_length(model.config)
    sent = [num_shared, teacher.payload, teacher.topk if teacher.payload == "topk" else None]
    result = hashlib.sha256(json.dumps([config, *sent], sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        result.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        for part in bit_sums(whole.detach()):
            result.update(pack(part)[2].data)
    return result.hexdigest()


def bit_sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns SUMS sums over all bits of a tensor, read as int64, and the bytes at its end that fill no whole group of them.

    Computed on its device, in one pass. Not a hash, but a weight that changes or moves changes a sum.
    """
    flat = tensor.contiguous().view(-1)
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()  # else torch does not read it as int64
    bits = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
    whole = bits.numel() // (8 * SUMS) * 8 * SUMS
    # Sums of integers come out the same in any order, on any device; what overflows wraps around.
    return bits[:whole].view(-1, 8 * SUMS).view(torch.int64).sum(0), bits[whole:]
