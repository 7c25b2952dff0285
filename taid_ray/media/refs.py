"""An image of a training row, without its bytes or its pixels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageRef:
    """One image of a row: what it is, where its tokens stand in the row, and where its bytes are to be read."""

    digest: str
    """XXH3 hash (128 bits, 32 hexadecimal digits) of the encoded image, as it stands in its file."""
    start: int
    """Index in the row of the first token that stands for the image, among them those that only frame it."""
    tokens: int
    """Number of tokens that stand for the image, all in one run."""
    width: int
    """Pixels, as the image is seen: after the rotation that its EXIF data ask for."""
    height: int
    """Pixels, as the image is seen."""
    place: str
    """Where the bytes are: `file:PATH`, `zip:ARCHIVE!MEMBER`, `pack:FILE@OFFSET+BYTES` or `memory:`; see `reader`."""
