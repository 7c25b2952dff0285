"""Images in a request to a teacher: whether every image token has its image, and the model's inputs of a part of the rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from taid_ray.data.batch import PAD_ID
from taid_ray.errors import TeacherError
from taid_ray.media.joining import Picture
from taid_ray.media.pictures import Images, Read
from taid_ray.media.processor import MediaProcessor

RowPictures = Sequence[Sequence[Picture]]
"""The processed images of each row of a request, in the order of their tokens; () if no row has one."""


def read_once(images: Images, read: Read | None) -> dict[str, bytes]:
    """Reads the images of a batch's rows, equal ones once. Returns their bytes by their digests. Errors as `read` raises."""
    assert read is not None, "a teacher that is shown images must be told how to read them"
    wanted = {image.digest: image for row in images for image in row}
    return {digest: read(image) for digest, image in wanted.items()}


def check_pictures(media: MediaProcessor, ids: Tensor, lengths: Sequence[int], pictures: RowPictures) -> None:
    """Raises TeacherError unless every image token of a request has its image, and every image its tokens.

    A model takes image tokens without an image for words, silently. ids: [B, T]. lengths: the positions of each row that
    are computed, which must not end inside of an image.
    """
    rows = pictures or [()] * len(ids)
    if len(rows) != len(ids):
        raise TeacherError(
            f"a request of {len(ids)} rows must hold the images of each (found {len(rows)} rows of images)"
        )
    wanted = (ids == media.image_token_id).sum(1).tolist()
    for number, (tokens, length, shown) in enumerate(zip(wanted, lengths, rows, strict=True)):
        features = sum(picture.features for picture in shown)
        if tokens != features:
            raise TeacherError(
                f"row {number} of a request has {tokens} image tokens, and its {len(shown)} images make {features} "
                "features; the teacher's processor must make the same tokens of an image as the student's"
            )
        if any(picture.start < length < picture.start + picture.tokens for picture in shown):
            raise TeacherError(
                f"row {number} of a request has its last loss position ({length - 1}) inside of an image"
            )


def with_pictures(
    media: MediaProcessor, inputs: dict[str, Tensor], lengths: Tensor, pictures: RowPictures, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Makes the model's inputs of rows of which only the first `lengths` [B] positions matter.

    inputs: [B, T] each; what lies behind a row's own length may be a part of an image, and is taken for padding. dtype: of
    the pixels.
    """
    behind = torch.arange(inputs["input_ids"].shape[1]) >= lengths[:, None]
    ids = inputs["input_ids"].masked_fill(behind, PAD_ID)
    shown = [
        [picture for picture in row if picture.start < length]
        for row, length in zip(pictures, lengths.tolist(), strict=False)
    ]
    made = media.inputs(ids, inputs["position_ids"], shown)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in made.items()}
