"""A vision-language model's processor: which tokens an image becomes, its pixels, and the model inputs of a batch."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taid_ray.errors import DataError, ModelError, shortened
from taid_ray.media.families import Family, family_of
from taid_ray.media.joining import Picture, joined, mrope_positions
from taid_ray.media.opening import open_image
from taid_ray.media.refs import ImageRef

GREY = (128, 128, 128)
"""Not half of 255: SmolVLM and Idefics3 take tiles whose values are all 0.0 for padding."""
PROBES = ((28, 28), (640, 480), (1000, 37), (37, 1000), (1333, 800), (336, 336))
"""Sizes (width, height) of the drawn images on which processors are tried."""
SMALL = ((32, 32), (512, 16))
"""Sizes (width, height) of which the blank row takes the one with fewer tokens: some families cut any square into many tiles."""


@dataclass(frozen=True)
class MediaSettings:
    """How images are processed. The driver decides, and every process of a run does just that."""

    backend: str
    """`torchvision` or `pil`: the two make slightly different pixels of an image."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Values that replace those of the models' own image processors, as in `data.image_processor`."""


@dataclass(frozen=True)
class Layout:
    """The tokens that stand for an image of some size."""

    ids: NDArray[np.int64]
    """All of them in order, those that only frame the image or its parts included."""
    features: int
    """Number of ids in whose place the model puts what its vision tower saw."""


class MediaProcessor:
    """Wraps a transformers processor. Safe to use from several threads."""

    def __init__(self, processor: Any, family: Family, settings: MediaSettings):
        self.processor, self.family, self.settings = processor, family, settings
        self.image_token_id = int(processor.image_token_id)
        """The id in whose place the model puts features of an image."""
        self.layout = lru_cache(4096)(self._layout)

    def _layout(self, width: int, height: int) -> Layout:
        """The tokens of an image of this size, from the size alone. Raises DataError if the family refuses it."""
        try:
            found = self.family.measure(self.processor.image_processor, height, width)
        except ValueError as error:
            raise DataError(
                f"an image of {width}x{height} pixels cannot be used ({error}); leave its row out"
            ) from None
        text = self.processor.replace_image_token(found, 0, **self.family.expansion)
        ids = np.array(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        ids.flags.writeable = False
        return Layout(ids, int((ids == self.image_token_id).sum()))

    def picture(self, ref: ImageRef, content: bytes) -> Picture:
        """Processes an image. Raises DataError if it cannot be decoded, or is not of the size that `ref` says."""
        image = open_image(content, ref.width, ref.height, ref.place)
        found = self.processor.image_processor([image], return_tensors="pt", **self.family.call)
        text = self.processor.replace_image_token(found, 0, **self.family.expansion)
        expected = self.layout(ref.width, ref.height)
        if text.count(self.processor.image_token) != expected.features or ref.tokens != len(expected.ids):
            raise DataError(
                f"the image {ref.place} ({ref.width}x{ref.height}) makes {text.count(self.processor.image_token)} features, and "
                f"{expected.features} were expected in {ref.tokens} tokens; prepare the data again"
            )
        tensors = {name: found[name] for name in self.family.inputs}
        if self.family.join == "rows":
            tensors = {name: tensor[0] for name, tensor in tensors.items()}  # of the one row of this call
        return Picture(ref.start, ref.tokens, tensors, expected.features)

    def inputs(
        self, input_ids: Tensor, position_ids: Tensor, pictures: Sequence[Sequence[Picture]]
    ) -> dict[str, Tensor]:
        """All inputs of the model for rows with images: ids, positions as the model wants them, and the images joined.

        input_ids, position_ids: [B, T]; pictures: those of each row in order, or () if there are none at all. Raises DataError
        if a row's image tokens are not those of its pictures: a model would take them for words.
        """
        pictures = pictures or [()] * len(input_ids)
        wanted = (input_ids == self.image_token_id).sum(dim=1).tolist()
        for number, (tokens, found) in enumerate(zip(wanted, pictures, strict=True), 1):
            features = sum(picture.features for picture in found)
            if tokens != features:
                raise DataError(
                    f"row {number} of a batch has {tokens} image tokens, and its images make {features} features"
                )
        positions = position_ids
        if self.family.mrope:
            positions = mrope_positions(position_ids, pictures, self.processor.image_processor.merge_size)
        return {"input_ids": input_ids, "position_ids": positions} | joined(self.family, pictures)

    def grey(self, ref: ImageRef) -> bytes:
        """A PNG of one grey, of the size of an image: what a model is shown to see whether it looks at images."""
        return grey_picture(ref.width, ref.height)

    def blank_row(self) -> tuple[NDArray[np.int64], ImageRef, bytes]:
        """The ids of a row that holds one small grey image and no text, the image's reference, and its bytes."""
        width, height = min(SMALL, key=lambda size: len(self.layout(*size).ids))
        ids = self.layout(width, height).ids
        ref = ImageRef("0" * 32, start=0, tokens=len(ids), width=width, height=height, place="grey:")
        return ids, ref, self.grey(ref)

    def identity(self) -> str:
        """A hash of everything that decides on tokens and pixels: the image processor's values, its backend, the tokens."""
        images = self.processor.image_processor
        sizes = {f"{width}x{height}": self.layout(width, height).ids.tolist() for width, height in SMALL}
        parts = [type(self.processor).__name__, type(images).__name__, images.to_dict(), sizes]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def grey_picture(width: int, height: int) -> bytes:
    """A PNG of one grey."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, height), GREY).save(buffer, "PNG")
    return buffer.getvalue()


def load_media_processor(source: str, settings: MediaSettings, key: str, revision: str | None = None) -> MediaProcessor:
    """Loads the processor of a model, a hub name or a directory, and tries it on drawn images of several sizes.

    key: the configuration key that names the model. Raises ModelError, naming it, if the model is of no known family, its
    processor cannot be loaded as `settings` say, or taid-ray makes other tokens or pixels than it does itself.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    place = str(Path(source).expanduser())
    name = place if Path(place).is_dir() else source
    with _explained(f"{key} = {source}"):
        config = AutoConfig.from_pretrained(name, revision=revision)
    family = family_of(config, key)
    problem = torchvision_problem() if family.torchvision or settings.backend == "torchvision" else None
    if problem:
        raise ModelError(
            f"{key}: processing images of a model of type {config.model_type} needs the package torchvision, which cannot be "
            f"imported ({problem}); run pip install 'taid-ray[vision]', with the torchvision made for the torch installed"
        )
    with _explained(f"{key} = {source}"):
        processor: Any = AutoProcessor.from_pretrained(name, revision=revision)
        images: Any = AutoImageProcessor.from_pretrained(name, revision=revision, backend=settings.backend)
        _check_options(images, family, settings.options, key)
        processor.image_processor = type(images).from_dict(images.to_dict() | dict(settings.options))
        media = MediaProcessor(processor, family, settings)
        _prove(media, key)
    return media


@cache
def torchvision_problem() -> str | None:
    """Says why torchvision cannot be imported here; None if it can."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # one made for another torch raises RuntimeError
        return shortened(error, 120)
    return None


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns whatever transformers raises into one ModelError that begins with `what`."""
    try:
        yield
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(
            f"{what}: its processor lacks a package; run pip install 'taid-ray[vision]' ({shortened(error)})"
        ) from error
    except Exception as error:
        raise ModelError(
            f"{what}: its processor cannot be used; save the model's processor beside its weights, or correct "
            f"data.image_processor ({shortened(error)})"
        ) from error


def _check_options(images: Any, family: Family, options: Mapping[str, Any], key: str) -> None:
    known = type(images).valid_kwargs.__annotations__
    for name in options:
        if name in family.call:
            raise ModelError(f"data.image_processor: {name} cannot be set; {key}'s processor always sets it itself")
        if name not in known:
            raise ModelError(
                f"data.image_processor: {type(images).__name__} of {key} has no setting {name!r} (it has: "
                f"{', '.join(sorted(known))})"
            )


def drawn(width: int, height: int) -> bytes:
    """A PNG of a shaded image of some size, the same on every machine."""
    from PIL import Image

    shade = Image.linear_gradient("L").resize((width, height))
    image = Image.merge("RGB", (shade, shade.rotate(180), Image.new("L", shade.size, width % 256)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _prove(media: MediaProcessor, key: str) -> None:
    """Raises ModelError if the processor, called on a text with drawn images, makes other ids or tensors than taid-ray."""
    processor, mark = media.processor, media.processor.image_token
    contents = [drawn(*size) for size in PROBES]
    text = "a".join([mark] * len(PROBES)) + "b"
    images = [open_image(content, *size, "drawn") for content, size in zip(contents, PROBES, strict=True)]
    wanted = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    short = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    layouts = iter([media.layout(*size) for size in PROBES])
    ids: list[int] = []
    pictures: list[Picture] = []
    for token in short:
        if token != media.image_token_id:
            ids.append(token)
            continue
        size, content = PROBES[len(pictures)], contents[len(pictures)]
        expansion = next(layouts).ids.tolist()
        ref = ImageRef("0" * 32, len(ids), len(expansion), *size, place="drawn")
        pictures.append(media.picture(ref, content))
        ids += expansion
    if ids != wanted["input_ids"][0].tolist():
        raise ModelError(
            f"{key}: taid-ray writes other tokens of images than {type(processor).__name__}; choose another model"
        )
    positions = torch.arange(len(ids))[None]
    for name, tensor in media.inputs(wanted["input_ids"], positions, [pictures]).items():
        if name in media.family.inputs and not torch.equal(tensor, wanted[name]):
            raise ModelError(
                f"{key}: taid-ray makes other {name} of images than {type(processor).__name__}; choose another model"
            )
