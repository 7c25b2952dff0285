"""Tests, with images, that a document sees its own image and none of its neighbours', in its batch and in its row."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from taid_ray.errors import ModelError
from taid_ray.media.processor import MediaProcessor, drawn
from taid_ray.models.probes import TOLERANCE, Probe, probe_inputs, relative_difference

WORDS = 5
"""Number of tokens of text behind each image."""


@torch.no_grad()
def check_images(probe: Probe, media: MediaProcessor, packed: bool) -> None:
    """Checks that a document's hidden states depend on its own image, and keep their bits where its neighbour's is another.

    The images have one size, so that all that is computed has the same shapes. packed: whether rows will be packed. Raises
    ModelError. Collective where the model is shared by several processes.
    """
    _, ref, grey = media.blank_row()
    shaded = drawn(ref.width, ref.height)
    before, after = (_hidden(probe, media, (first, shaded), False) for first in (shaded, grey))
    if not _same(probe, before[1], after[1]):
        raise ModelError(f"{probe.name} lets a row of a batch see the image of another one; choose another model")
    if not probe.everywhere(not torch.equal(before[0, -WORDS:], after[0, -WORDS:])):
        raise ModelError(
            f"{probe.name} does not look at its images: the hidden states of words behind one are the same with another one; "
            "check the vision weights in its checkpoint, or choose another model"
        )
    if not packed:
        return
    alone = before
    before, after = (_hidden(probe, media, (first, shaded), True) for first in (shaded, grey))
    if not _same(probe, before[1], after[1]):
        raise ModelError(
            f"{probe.name} lets documents packed into one row see the image in front of theirs; set data.pack: false"
        )
    difference = relative_difference(before, alone)
    if not (probe.mixture or difference <= TOLERANCE[before.dtype]):
        raise ModelError(
            f"{probe.name} gives packed documents with images other hidden states than alone (they differ by {difference:.1e} "
            "of the largest); set data.pack: false"
        )


def _hidden(probe: Probe, media: MediaProcessor, contents: Sequence[bytes], packed: bool) -> Tensor:
    """Hidden states [D, T, H] of documents of one image and some words, each in a row of its own or all in one."""
    image, ref, _ = media.blank_row()
    known = probe_inputs(probe.vocab_rows, torch.device("cpu"))["input_ids"].flatten()
    words = known[(known != media.image_token_id) & (known >= min(8, probe.vocab_rows // 2))][:WORDS]
    document = torch.cat([torch.from_numpy(image.copy()), words])
    ids, positions = document.repeat(len(contents), 1), torch.arange(len(document)).repeat(len(contents), 1)
    pictures = [[media.picture(ref, content)] for content in contents]
    if packed:
        shifted = [replace(row[0], start=number * len(document)) for number, row in enumerate(pictures)]
        ids, positions, pictures = ids.view(1, -1), positions.view(1, -1), [shifted]
    inputs = media.inputs(ids, positions, pictures)
    hidden = probe.compute({name: tensor.to(probe.device) for name, tensor in inputs.items()})
    return hidden.reshape(len(contents), len(document), -1)


def _same(probe: Probe, before: Tensor, after: Tensor) -> bool:
    """Compares bits, or, of a mixture, whose products of matrices have other shapes with other tokens, values."""
    if probe.mixture:
        return probe.everywhere(relative_difference(after, before) <= TOLERANCE[before.dtype])
    return probe.everywhere(torch.equal(before, after))
