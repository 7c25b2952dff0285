"""What is said of an image by its header: its size as it is seen, or why it cannot be used."""

import re
import zlib

import pytest
from PIL import Image

from taid_ray.media.headers import BadImage, check_pixels, picture_size
from tests.support.images import picture

MOST = 1000


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    + [("JPEG", mode) for mode in ("L", "RGB", "CMYK")]
    + [("GIF", "L"), ("BMP", "RGB"), ("TIFF", "RGB"), ("WEBP", "RGB")],
)
def test_formats_and_kinds_of_pixels(kind: str, mode: str) -> None:
    content = picture(kind=kind, mode=mode)
    assert picture_size(content, MOST) == (8, 6)
    check_pixels(content, MOST)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (8, 6)), (3, (8, 6)), (6, (6, 8)), (8, (6, 8))])
def test_size_after_rotation(kind: str, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert picture_size(picture(kind=kind, exif=exif), MOST) == size


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels."""
    content = bytearray(picture())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no picture"),
        (b"<svg></svg>", "is no picture (its format is none of BMP, GIF, JPEG, PNG, TIFF, WEBP)"),
        (picture()[:20], "is no picture"),
        (bomb(40, 30), "has 1,200 pixels, more than data.max_image_pixels = 1,000"),
        (bomb(20000, 20000), "has more pixels than data.max_image_pixels = 1,000"),
        (picture(mode="I;16"), "is of mode I;16"),
        (picture(mode="F", kind="TIFF"), "is of mode F"),
    ],
)
def test_refused(content: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=re.escape(reason)):
        picture_size(content, MOST)


def test_moving_pictures_are_refused() -> None:
    frames = [Image.new("L", (8, 6), shade) for shade in (1, 200)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        content = picture(kind=kind, mode="L", save_all=True, append_images=frames)
        with pytest.raises(BadImage, match="frames, and only still pictures"):
            picture_size(content, MOST)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damage_behind_the_header_is_found_by_decoding(kind: str) -> None:
    cut = picture((300, 300), kind)[:-80]
    assert picture_size(cut, 90_000) == (300, 300)
    with pytest.raises(BadImage, match="is damaged"):
        check_pixels(cut, 90_000)
