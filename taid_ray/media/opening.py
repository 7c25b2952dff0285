"""Opens the bytes of an image as the picture that people see: upright, in RGB."""

import io
from typing import Any

from taid_ray.errors import DataError, shortened
from taid_ray.media.headers import FORMATS


def open_image(content: bytes, width: int, height: int, name: str) -> Any:
    """Decodes an image into a PIL image of mode RGB, rotated as its EXIF data ask for.

    width, height: the size that it must have then; compared with its header first, so that nothing else is ever decoded.
    Raises DataError, naming `name`, if it cannot be decoded or has another size.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if sorted(image.size) != sorted((width, height)):
                raise DataError(_other_size(name, image.size, width, height))
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others
        raise DataError(
            f"the image {name} cannot be read ({shortened(error, 120)}); mend it, or leave its row out"
        ) from None
    if upright.size != (width, height):
        raise DataError(_other_size(name, upright.size, width, height))
    return upright


def _other_size(name: str, found: tuple[int, int], width: int, height: int) -> str:
    return (
        f"the image {name} has {found[0]}x{found[1]} pixels, and had {width}x{height} when the data were prepared; restore it, "
        "or prepare the data again"
    )
