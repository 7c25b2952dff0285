"""Tests that no position sees what it must not see: what follows it, other rows of the batch, other documents of its row.

Documents change places, and the hidden states of all that must not notice have to keep their bits. Nothing is trained, no
random number is drawn, and models are expected in eval mode.
"""

from typing import Any

import torch
from torch import Tensor

from taid_ray.errors import ModelError
from taid_ray.models.probes import (
    PROBE_LENGTH,
    TOLERANCE,
    Probe,
    not_finite,
    of_the_machine,
    probe_inputs,
    relative_difference,
)

TYPICAL_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a position's hidden states computed in two shapes, relative to their norm, at half of the positions. At
some others a mixture takes other experts because something was rounded otherwise."""
OTHER_ENDS, OTHER_STARTS = [0, 3, 2, 1], [2, 1, 0, 3]
"""Orders of the documents of `_documents`. They change places, so that all the same are computed and a router sends each expert
as many: the bits of a product of matrices depend on its number of rows."""
ODD_LENGTH = 21
"""A length of rows that is no multiple of any chunk."""
Places = tuple[slice, ...]


def check_probe(probe: Probe, packed: bool, longest: int = PROBE_LENGTH) -> None:
    """Makes all checks of this module, with short rows and with long ones. Errors as they raise.

    packed: whether rows will be packed. longest: length of the long rows, in positions.
    """
    for length in sorted({PROBE_LENGTH, longest}):
        check_rows(probe, length)
        if packed:
            check_packing(probe, length)
    check_neighbours(probe, longest)
    with torch.no_grad():  # rows of any length must be computed; some architectures take multiples of a chunk only
        probe.of_documents(_tokens(probe, 2 * ODD_LENGTH).view(2, ODD_LENGTH), packed=False)


@torch.no_grad()
def check_rows(probe: Probe, length: int = PROBE_LENGTH) -> None:
    """Checks that no position sees the tokens that follow it, and no row another row of its batch.

    length: of the rows, in positions, about. Raises ModelError if they do, or if hidden states are not finite. Collective for a
    tensor-parallel model.
    """
    ids = _documents(probe, length)
    before = probe.of_documents(ids, packed=False)
    if not bool(torch.isfinite(before).all()):
        raise ModelError(f"the hidden states of {probe.name} are {not_finite(before.dtype, probe.section)}")
    if _changes(probe, ids, before, OTHER_STARTS, packed=False):
        remedy = "choose another model"
        if probe.one_row:
            remedy = f"flash attention needs them joined to one row; set {probe.section}.attention: sdpa"
        raise ModelError(f"{probe.name} lets the rows of a batch see each other; {remedy}")
    if _changes(probe, ids, before, OTHER_ENDS, packed=False):
        raise ModelError(
            f"{probe.name} lets a position see the tokens that follow it (with other last tokens the hidden states before "
            "them change), so it is no causal language model; choose another model"
        )


@torch.no_grad()
def check_packing(probe: Probe, length: int = PROBE_LENGTH) -> None:
    """Checks that documents packed into one row (position_ids restart) do not see each other, and are as they are alone.

    length: of the row, in positions, about. Raises ModelError if they do. Collective for a tensor-parallel model.
    """
    ids = _documents(probe, length)
    packed = probe.of_documents(ids, packed=True)
    if _changes(probe, ids, packed, OTHER_STARTS, packed=True):
        raise ModelError(
            f"{probe.name} lets documents packed into one row see each other (hidden states change with the document in "
            "front of theirs); set data.pack: false"
        )
    alone = probe.of_documents(ids, packed=False)
    difference = _typical_difference(packed[1::2], alone[1::2])
    strict = packed.dtype == torch.float32 and length <= PROBE_LENGTH
    fine = not strict or relative_difference(packed, alone) <= TOLERANCE[packed.dtype]
    if not (fine and difference <= TYPICAL_TOLERANCE[packed.dtype]):
        raise ModelError(
            f"{probe.name} gives documents packed into one row other hidden states than alone (half of them differ by "
            f"{difference:.1e} or more); set data.pack: false"
        )


@torch.no_grad()
def check_neighbours(probe: Probe, length: int = PROBE_LENGTH) -> None:
    """Checks that a short row has the same hidden states alone and beside a longer row.

    length: of that row, in positions. Raises ModelError if not. Collective for a tensor-parallel model.
    """
    rows, short = _tokens(probe, 2 * length).view(2, length), length // 2
    positions = torch.arange(length, device=probe.device).expand(2, -1)
    alone = probe.compute({"input_ids": rows[:1, :short], "position_ids": positions[:1, :short]})
    beside = probe.compute({"input_ids": rows, "position_ids": positions})[:1, :short]
    difference, allowed = _typical_difference(beside, alone), TYPICAL_TOLERANCE[alone.dtype]
    if not difference <= allowed:
        raise ModelError(
            f"the hidden states of {probe.name} for a row of {short} tokens depend on the longest row of the batch (beside "
            f"{length} tokens half of them differ by {difference:.1e} or more, allowed {allowed:.0e}), so that nothing could "
            f"be distilled exactly; set data.sequence_length below {length}, or choose another model"
        )


def _documents(probe: Probe, length: int) -> Tensor:
    """Token ids [4, T] of two pairs of documents, the second ones different in their last token only; 2 T is about `length`.

    T is odd, so that no document ends where layers cut rows into chunks.
    """
    size = max(3, (length // 2 - 1) | 1)
    first, second = _tokens(probe, 2 * size).view(2, size)
    changed = second.clone()
    changed[-1] = second[0] if second[0] != second[-1] else first[0]
    return torch.stack([first, second, first.flip(0), changed])


def _tokens(probe: Probe, count: int) -> Tensor:
    """Pseudo-random token ids [count] out of those of `probe_inputs`, because some others may stand for images.

    Without the first few, where a token may be that a model takes for padding.
    """
    known = probe_inputs(probe.vocab_rows, probe.device)["input_ids"].flatten()
    known = known[known >= min(8, probe.vocab_rows // 2)]
    place = torch.arange(count, device=probe.device)
    return known[(place * 7 + place // 5) % len(known)]


def _changes(probe: Probe, ids: Tensor, before: Tensor, order: list[int], packed: bool) -> bool:
    """Tells whether hidden states change that must not, where the documents stand in another order.

    before: those of `ids` as they are. The bits decide, but for models that may give others for the same: those that do, and
    mixtures, whose products of matrices depend on where in them a token stands. Of those the gradient decides, if there is one.
    """
    after = probe.of_documents(ids[order], packed)
    kept = (slice(None), slice(-1)) if order == OTHER_ENDS else (slice(1, None, 2),)
    if probe.everywhere(torch.equal(before[kept], after[kept])):
        return False
    if not _typical_difference(after[kept], before[kept]) <= TYPICAL_TOLERANCE[before.dtype]:
        return True
    moved = (slice(1, None, 2), slice(-1, None)) if order == OTHER_ENDS else (slice(0, None, 2),)
    if probe.embedding is not None and ids.shape[1] < PROBE_LENGTH:  # of long rows it would not fit into memory
        found = _has_gradient(probe, ids, kept, moved, packed)
        if found is not None:
            return found
    return not probe.mixture and torch.equal(before, probe.of_documents(ids, packed))


def _has_gradient(probe: Probe, ids: Tensor, kept: Places, moved: Places, packed: bool) -> bool | None:
    """Tells whether hidden states of some positions of documents [D, T] depend on the embeddings of others, however little.

    None if this model computes no gradients, or zeros only, for example in the kernels of its quantization.
    """
    embedded: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = probe.embedding.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            total = probe.of_documents(ids, packed)[kept].float().square().sum()
        gradients = torch.autograd.grad(total, embedded)
    except (RuntimeError, ValueError) as error:
        if of_the_machine(error):
            raise
        return None
    finally:
        handle.remove()
    if not any(bool(gradient.any()) for gradient in gradients):
        return None
    if any(gradient.numel() != ids.numel() * gradient.shape[-1] for gradient in gradients):
        return True  # more is embedded than the documents, and what belongs to which is not known
    return any(bool(gradient.reshape(*ids.shape, -1)[moved].any()) for gradient in gradients)


def _typical_difference(found: Tensor, expected: Tensor) -> float:
    """The median over all positions of the difference of hidden states [..., H], relative to their norm."""
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).median())
