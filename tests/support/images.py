"""Small images as bytes, and a stand-in for a model's processor, which only says what tokens an image becomes."""

from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from taid_ray.errors import DataError
from tests.support.chats import chat_tokenizer

IMAGE_TOKEN, OPEN, CLOSE = "<|image|>", "<|open|>", "<|close|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As those of SmolVLM and Idefics3: contents in parts only."""


def picture(
    size: tuple[int, int] = (8, 6), kind: str = "PNG", mode: str = "RGB", shade: int = 7, **options: Any
) -> bytes:
    """Draws a picture of one shade in a format that Pillow writes."""
    stream = BytesIO()
    Image.new(mode, size, shade if mode in ("L", "I", "F", "P", "I;16", "1") else (shade,) * len(mode)).save(
        stream, kind, **options
    )
    return stream.getvalue()


def vision_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A byte-level tokenizer that knows the tokens of images."""
    tokenizer = chat_tokenizer(template)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN, OPEN, CLOSE]})
    return tokenizer


class Ids(NamedTuple):
    ids: NDArray[np.int64]


class StubTokens:
    """An image of W x H becomes OPEN, as many image tokens as it has pixels by 16, and CLOSE; one wider than 1,000 is refused."""

    def __init__(self, tokenizer: Any) -> None:
        self.image_token_id, self.open, self.close = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, OPEN, CLOSE])

    def layout(self, width: int, height: int) -> Ids:
        if width > 1000:
            raise DataError(f"an image of {width}x{height} pixels cannot be used")
        return Ids(np.array([self.open, *[self.image_token_id] * (width * height // 16), self.close]))

    def identity(self) -> str:
        return "stub"
