"""The frozen teacher in one process, or one shard of it: loading, tests, and scoring of batches."""

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from taid_ray.config.models import TeacherConfig
from taid_ray.errors import ModelError, TeacherError
from taid_ray.media.pictures import Images, Read, pictures_of
from taid_ray.media.processor import MediaSettings, load_media_processor
from taid_ray.models.head import Head, head_of, hidden_states
from taid_ray.models.isolation import check_packing, check_probe
from taid_ray.models.lengths import chunk_length, context_length
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.probes import PROBE_LENGTH, Probe, long_probe, probe_inputs, probe_of
from taid_ray.models.self_test import explained_tests, self_test
from taid_ray.teacher.fingerprint import digest, fingerprint, head_digest
from taid_ray.teacher.groups import micro_batches, used_lengths
from taid_ray.teacher.payload import (
    bytes_per_token,
    check_topk,
    divergence,
    encode,
    measured_error,
    needs_head,
    row_means,
)
from taid_ray.teacher.pictures import RowPictures, check_pictures, with_pictures
from taid_ray.teacher.protocol import TeacherInfo


class TeacherModel:
    """A frozen teacher that scores batches deterministically."""

    def __init__(
        self,
        config: TeacherConfig,
        num_shared: int,
        device: torch.device,
        leader: bool = True,
        media: MediaSettings | None = None,
    ):
        """Loads and tests the model. With config.shards > 1 all processes of the group construct it together.

        leader: False for the shards whose answers nobody reads; they keep no whole head. media: how images are processed;
        None for a model that is shown none.
        Raises ConfigError or ModelError if the model cannot be used so, TeacherError if it is not deterministic.
        """
        if config.payload == "topk":
            check_topk(config.topk, num_shared)
        self._config, self._device = config, device
        self._media = (
            None if media is None else load_media_processor(config.model, media, "teacher.model", config.revision)
        )
        self._model = load_causal_lm(config, device=device, images=media is not None).requires_grad_(False)
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
        identity = fingerprint(self._model, num_shared, config, self._media)
        if leader:
            self._info = self._describe(identity, answer, logits, packing_error)

    @property
    def model(self) -> Any:
        """The transformers model, for what `score` does not offer (text generation)."""
        return self._model

    def pictures(self, images: Images, read: Read) -> RowPictures:
        """Reads and processes the images of a request. Raises what `read` raises, and DataError for one that is broken."""
        if not images:
            return ()
        assert self._media is not None, "a teacher that is shown images must be told how to process them"
        return pictures_of(self._media, images, read)

    def score(
        self, inputs: dict[str, Tensor], loss_positions: Tensor, labels: Tensor, pictures: RowPictures = ()
    ) -> dict[str, Tensor]:
        """Computes the payload's tensors (see payload) at the loss positions, on the teacher's device; {} but for the leader.

        inputs: [B, T] each, padded on the right with continuing position_ids. loss_positions: [N], ascending, into
        B * T. labels: [N], the ids they predict, which only payload topk looks at. pictures: see RowPictures. What is
        computed together is a function of this request alone, so that the same request always gives the same bits.
        Collective for a tensor-parallel teacher. Raises TeacherError for impossible ids and for image tokens without images.
        """
        self.check_request(inputs, loss_positions, labels, pictures)
        return self._answer(inputs, loss_positions, labels, pictures)

    def payload_error(self, inputs: dict[str, Tensor], loss_positions: Tensor, pictures: RowPictures = ()) -> float:
        """Measures what the payload loses on average over the loss positions, see payload.measured_error; 0.0 if exact.

        Arguments and errors as in `score`. The leader calls it while the other shards of a tensor-parallel teacher `score`.
        """
        self.check_request(inputs, loss_positions, pictures=pictures)
        hidden, config = self._hidden(inputs, loss_positions, pictures), self._config
        return measured_error(config.payload, hidden, self.head().to(self._device), config.topk)

    def seeing(
        self, inputs: dict[str, Tensor], loss_positions: Tensor, pictures: RowPictures, others: RowPictures
    ) -> list[float]:
        """Measures how far other pictures in their places change what the model predicts, whatever the payload.

        Returns for each row the mean over its loss positions of KL(pictures || others) in nats, over the shared ids; 0.0
        for a row that has none. The leader calls it while the other shards of a tensor-parallel teacher `score` first the
        one, then the other.
        """
        for shown in (pictures, others):
            self.check_request(inputs, loss_positions, pictures=shown)
        seen, unseen = (self._hidden(inputs, loss_positions, shown) for shown in (pictures, others))
        found = divergence(self.head().to(self._device), seen, unseen)
        return row_means(found, loss_positions, inputs["input_ids"].shape)

    def check_request(
        self,
        inputs: dict[str, Tensor],
        loss_positions: Tensor,
        labels: Tensor | None = None,
        pictures: RowPictures = (),
    ) -> None:
        """Raises TeacherError for ids or positions that do not exist: on a GPU they would take the process down.

        So for image tokens without an image, which a model would take for words, and for images without tokens.
        """
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
        if self._media is not None:
            check_pictures(self._media, ids, used_lengths(loss_positions, *ids.shape).tolist(), pictures)

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

    def _answer(
        self, inputs: dict[str, Tensor], loss_positions: Tensor, labels: Tensor, pictures: RowPictures
    ) -> dict[str, Tensor]:
        """Does what `score` does, for a request that is known to be possible."""
        hidden = self._hidden(inputs, loss_positions, pictures)
        if self._head is None:
            return {}
        return encode(self._config.payload, hidden, self._head, labels.to(self._device), self._config.topk)

    @torch.no_grad()  # not inference_mode: its tensors may not be saved for a student's backward pass
    def _hidden(self, inputs: dict[str, Tensor], loss_positions: Tensor, pictures: RowPictures) -> Tensor:
        """Computes the hidden states [N, H] at the loss positions, in their order."""
        rows, length = inputs["input_ids"].shape
        row, column = loss_positions // length, loss_positions % length
        used = used_lengths(loss_positions, rows, length)
        result = torch.empty(len(loss_positions), self._hidden_size, dtype=self._dtype, device=self._device)
        for group in micro_batches(used.tolist(), self._config.max_tokens):
            chosen, longest = torch.tensor(group), int(used[group[0]])
            place = torch.full((rows,), -1).scatter_(0, chosen, torch.arange(len(group)))[row]
            here = (place >= 0).nonzero().flatten()
            cut = {name: tensor[chosen, :longest] for name, tensor in inputs.items()}
            if self._media is not None:
                shown = [pictures[number] for number in group] if pictures else ()
                cut = with_pictures(self._media, cut, used[chosen], shown, self._dtype)
            wanted = (place[here] * longest + column[here]).to(self._device)
            computed = hidden_states(self._model, {name: tensor.to(self._device) for name, tensor in cut.items()})
            result[here.to(self._device)] = computed.flatten(0, 1)[wanted]
        return result

    def _check_deterministic(self) -> dict[str, Tensor]:
        """Scores the probe twice and returns the answer. Raises TeacherError unless the bits are the same."""
        inputs = probe_inputs(self._vocab_rows, torch.device("cpu"))
        answer = self._same_twice(inputs, ())
        if self._media is None:
            return answer
        ids, image, content = self._media.blank_row()
        row = {"input_ids": torch.from_numpy(ids)[None], "position_ids": torch.arange(len(ids))[None]}
        seen = self._same_twice(row, self.pictures(((image,),), lambda _: content))
        return answer | {f"image {name}": tensor for name, tensor in seen.items()}

    def _same_twice(self, inputs: dict[str, Tensor], pictures: RowPictures) -> dict[str, Tensor]:
        """Scores inputs twice, unchecked, because a probe may hold image tokens; errors as `_check_deterministic`."""
        positions = torch.arange(inputs["input_ids"].numel())
        first, second = (self._answer(inputs, positions, torch.zeros_like(positions), pictures) for _ in range(2))
        for name in first:
            if digest(first[name]) != digest(second[name]):
                difference = float((first[name].float() - second[name].float()).abs().max())
                raise TeacherError(
                    f"teacher.model = {self._config.model} is not deterministic: scoring the probe twice gave {name} that "
                    f"differ by up to {difference:.1e}; try teacher.attention: eager"
                )
        return first

    def _describe(
        self, identity: str, answer: dict[str, Tensor], logits: Tensor, packing_error: str | None
    ) -> TeacherInfo:
        """Returns what identifies the teacher. answer: to the probe; logits: the model's own on the probe, all rows."""
        model, config, head = self._model, self._config, self.head()
        num_shared, hidden_size = head.weight.shape
        return TeacherInfo(
            fingerprint=identity,
            probe_digest=digest(*answer.values()),
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


def _packing_error(probe: Probe, lengths: Set[int]) -> str | None:
    try:
        for length in sorted(lengths):
            check_packing(probe, length)
    except ModelError as error:
        return str(error)
    return None
