"""Tokens of images in samples: the one that a template writes for an image becomes all those that stand for one of its size."""

from collections.abc import Sequence

from taid_ray.data.images import FoundImage, ImageTokens
from taid_ray.data.packing import Sample
from taid_ray.media.refs import ImageRef


def expanded(sample: Sample, images: Sequence[FoundImage], tokens: ImageTokens) -> Sample:
    """Puts all tokens of each image in the place of its one token; none of them carries loss.

    To tokenise the short text and then insert ids gives the same ids as to tokenise a text with all tokens written out, and is
    much faster. Raises ValueError if the sample has not one token for each of the images, which are in order.
    """
    places = [at for at, token in enumerate(sample.input_ids) if token == tokens.image_token_id]
    ids: list[int] = []
    mask: list[bool] = []
    refs = []
    done = 0
    for at, image in zip(places, images, strict=True):
        ids += sample.input_ids[done:at]
        mask += sample.loss_mask[done:at]
        own = tokens.layout(image.width, image.height).ids.tolist()
        refs.append(ImageRef(image.digest, len(ids), len(own), image.width, image.height, image.place))
        ids += own
        mask += [False] * len(own)
        done = at + 1
    return Sample(ids + sample.input_ids[done:], mask + sample.loss_mask[done:], sample.document, tuple(refs))


def shortened_to(sample: Sample, length: int) -> Sample:
    """Cuts off the end of a sample, so that at most `length` tokens are left; before an image rather than inside it."""
    ends = {image: image.start + image.tokens for image in sample.images}
    stop = min([length, *(image.start for image, end in ends.items() if end > length)])
    kept = tuple(image for image, end in ends.items() if end <= stop)
    return Sample(sample.input_ids[:stop], sample.loss_mask[:stop], sample.document, kept)
