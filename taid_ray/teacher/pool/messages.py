"""Messages between the clients of a teacher pool and its replicas, each with its checksum, and the errors of replicas."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from taid_ray.data.batch import Batch
from taid_ray.errors import MessageError, TeacherError
from taid_ray.media.joining import Picture
from taid_ray.media.refs import ImageRef
from taid_ray.teacher.pictures import RowPictures
from taid_ray.teacher.wire import Packed, digest, pack, unpack, verify

ScoreInputs = tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]
"""Model inputs by name ([B, T] each), loss positions [N] and labels [N] of a request."""


class ScoreRequest(NamedTuple):
    """A batch on its way to a replica, with a checksum."""

    inputs: dict[str, Packed]
    targets: dict[str, Packed]
    """loss_positions and labels."""
    checksum: str
    """Digest of inputs, targets and images."""
    images: tuple[tuple[ImageRef, ...], ...] = ()
    """The images of each row, as in Batch."""
    contents: Any = None
    """Reference to an object in Ray's store that holds the files' bytes, see `contents_of`; None without images."""

    @classmethod
    def of(cls, batch: Batch, contents: Any = None) -> "ScoreRequest":
        """Packs a batch, without copies where its tensors are contiguous. contents: see the field."""
        inputs = _packed(batch.inputs)
        targets = _packed({"loss_positions": batch.loss_positions, "labels": batch.labels})
        return cls(inputs, targets, digest(_joined(inputs, targets, batch.images)), batch.images, contents)

    def unpacked(self) -> ScoreInputs:
        """Returns what was packed, without the images. Raises MessageError if this is not what was sent."""
        verify(_joined(self.inputs, self.targets, self.images), self.checksum)
        inputs = {name: unpack(packed) for name, packed in self.inputs.items()}
        return inputs, unpack(self.targets["loss_positions"]), unpack(self.targets["labels"])

    def checked_contents(self, found: Mapping[str, Any]) -> dict[str, bytes]:
        """Returns the images' bytes by their digests, which they must have. found: the object that `contents` refers to.

        Raises MessageError if one is missing or damaged.
        """
        wanted = {image.digest for images in self.images for image in images}
        checked = {}
        for name in wanted:
            checked[name] = bytes(found.get(name, b""))
            if xxhash.xxh3_128_hexdigest(checked[name]) != name:
                raise MessageError(f"the image {name} arrived damaged ({len(checked[name])} bytes)")
        return checked


def contents_of(images: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    """Makes of images' bytes, by their digests, arrays that Ray's object store keeps and reads without copying."""
    return {name: np.frombuffer(content, np.uint8) for name, content in images.items()}


PackedPictures = Sequence[Sequence[Picture]]
"""RowPictures with numpy arrays in place of tensors, which Ray's object store keeps and reads without copying."""


def packed_pictures(pictures: RowPictures) -> PackedPictures:
    """Prepares pictures for the other shards of a replica, which share its node."""
    return _with_tensors(pictures, lambda tensor: tensor.numpy())


def unpacked_pictures(packed: PackedPictures) -> RowPictures:
    """Returns what was packed, sharing its memory."""
    return _with_tensors(packed, torch.from_numpy)


def _with_tensors(pictures: RowPictures, made: Callable[[Any], Any]) -> RowPictures:
    return tuple(
        tuple(replace(one, tensors={name: made(tensor) for name, tensor in one.tensors.items()}) for one in row)
        for row in pictures
    )


class HeadPiece(NamedTuple):
    """Some rows of the teacher's head."""

    fingerprint: str
    """The teacher's, see TeacherInfo."""
    rows: dict[str, Packed]
    """weight, and bias if there is one."""
    checksum: str
    """Digest of the rows."""


class ScoreResponse(NamedTuple):
    """A replica's answer to one request."""

    payload: dict[str, Packed]
    """The payload's tensors, see teacher/payload."""
    compute_s: float
    """Seconds of computation, without waiting for other requests."""
    replica: str
    """Id of the replica that computed it."""
    checksum: str
    """Digest of the payload."""


class ReplicaBrokenError(TeacherError):
    """Raised when a shard of this replica is lost; another replica, or this one's successor, can answer."""


class AlreadyHereError(TeacherError):
    """Raised for a request that this replica is computing, or has in its queue; another replica is to be asked."""


def sealed(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Packed], str]:
    """Packs tensors and adds their checksum."""
    packed = _packed(tensors)
    return packed, digest(packed)


def _packed(tensors: dict[str, torch.Tensor]) -> dict[str, Packed]:
    return {name: pack(tensor) for name, tensor in tensors.items()}


def _joined(inputs: dict[str, Packed], targets: dict[str, Packed], images: Any) -> dict[str, Packed]:
    """Merges all under names that cannot coincide: a model may have an input called labels."""
    merged = {f"inputs.{name}": packed for name, packed in inputs.items()} | targets
    if images:
        text = np.frombuffer(repr(images).encode(), np.uint8)
        merged["images"] = ("uint8", text.shape, text)
    return merged
