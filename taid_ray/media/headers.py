"""What an encoded image says of itself: whether it can be used at all, and its size. Pixels are not decoded."""

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats, as Pillow calls them, that are read."""
MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))
"""Kinds of pixels that become red, green and blue of 8 bits without a loss, but for transparency."""
ORIENTATION = 0x0112
"""Number of the orientation among EXIF data; from 5 on, width and height change places."""
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""One of these stands in a PNG file that has an orientation."""


class BadImage(Exception):
    """Why an image cannot be used, as the end of a sentence that begins with its name."""


def picture_size(content: bytes, most_pixels: int) -> tuple[int, int]:
    """Returns width and height of an encoded image as it is seen, after the rotation that its EXIF data ask for.

    Raises BadImage for what is no picture of one of FORMATS, has no pixels or more than `most_pixels`, several frames, or
    pixels of another kind than MODES. Damage further on is not found.
    """
    image = _opened(content, most_pixels)
    width, height = image.size
    if width * height == 0:
        raise BadImage("has 0 pixels")
    if width * height > most_pixels:
        raise BadImage(f"has {width * height:,} pixels, more than data.max_image_pixels = {most_pixels:,}")
    if image.mode not in MODES:
        raise BadImage(f"is of mode {image.mode}, whose values do not fit 8 bits a colour")
    try:
        if image.format != "MPO" and getattr(
            image, "is_animated", False
        ):  # the rest of an MPO is a preview or a depth map
            raise BadImage(f"has {getattr(image, 'n_frames', 2)} frames, and only still pictures can be used")
        turned = _orientation(image, content) >= 5
    except BadImage:
        raise
    except Exception as error:  # Pillow's readers raise whatever damaged bytes lead to
        raise _no_picture(error) from None
    return (height, width) if turned else (width, height)


def check_pixels(content: bytes, most_pixels: int) -> None:
    """Decodes an encoded image that `picture_size` accepts, JPEG at an eighth of its size. Raises BadImage if it is damaged."""
    image = _opened(content, most_pixels)
    try:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))  # does nothing but to JPEG
        image.load()
    except Exception as error:
        raise BadImage(f"is damaged ({_reason(error)})") from None


def _opened(content: bytes, most_pixels: int) -> "ImageFile":
    from PIL import Image

    try:
        return Image.open(BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"has more pixels than data.max_image_pixels = {most_pixels:,}") from None
    except Exception as error:
        raise _no_picture(error) from None


def _orientation(image: "ImageFile", content: bytes) -> int:
    if image.format == "TIFF":
        return 1  # Pillow has turned its size already
    if image.format == "PNG" and not any(mark in content for mark in PNG_ORIENTATION):
        return 1  # Pillow would decode all pixels to look for it behind them
    found = image.getexif().get(ORIENTATION, 1)
    return found if isinstance(found, int) else 1


def _no_picture(error: Exception) -> BadImage:
    from PIL import UnidentifiedImageError

    known = f"its format is none of {', '.join(FORMATS)}"
    return BadImage(f"is no picture ({known if isinstance(error, UnidentifiedImageError) else _reason(error)})")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
