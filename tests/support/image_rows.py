"""Feeds the encoder mutated rows with images, in a process of its own: `python -m tests.support.image_rows COUNT`.

Its memory is limited: a trap that unpacks to gigabytes ends in an error of the allocation, and the peak is told. Prints JSON.
"""

import json
import os
import random
import resource
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from PIL import Image

from taid_ray.config.data import DataSource
from taid_ray.data.encoding import Encoder
from taid_ray.data.images import EncoderMedia
from taid_ray.errors import DataError
from tests.support.images import IMAGE_TOKEN, StubTokens, picture, vision_tokenizer

MEMORY = 500 << 20
TOKENIZER = vision_tokenizer()
TOKENS = StubTokens(TOKENIZER)
LENGTH = 400


def originals() -> list[bytes]:
    """Small pictures of all formats and kinds of pixels, with EXIF data, and of several frames."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [Image.new("L", (20, 12), 9)]}
    return [
        *(picture((20, 12), "PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(picture((20, 12), "JPEG", mode, quality=30) for mode in ("L", "RGB", "CMYK")),
        *(picture((20, 12), kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")),
        *(picture((20, 12), kind, "L", **frames) for kind in ("GIF", "PNG", "WEBP", "TIFF")),
        *(picture((20, 12), kind) for kind in ("BMP", "GIF", "WEBP", "TIFF")),
        picture((20, 12), "TIFF", "F"),
    ]


def bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels that takes a thousandth of their memory."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(min(height, 9000))) + packer.flush()
    chunks = [
        (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
        for part in (head, b"IDAT" + rows, b"IEND")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class Mutator:
    """Makes rows, the same ones for the same seed."""

    def __init__(self, folder: Path) -> None:
        self.random = random.Random(18)
        self._originals, self._folder = originals(), folder
        self._bombs = [bomb(8000, 8000), bomb(30000, 30000), bomb(1, 60000), self._webp_bomb()]
        self._names = [
            "0.png",
            "./0.png",
            "a/../0.png",
            "none.png",
            "",
            "a",
            "../x",
            "é \u2028.png",
            "x" * 300,
            "\0",
            "\ud800",
            "/dev/zero",
        ]
        for name in ("0.png", "é \u2028.png"):
            (folder / name).write_bytes(self._originals[4])
        (folder / "a").mkdir()
        with zipfile.ZipFile(folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("0.png", self._originals[4])
            archive.writestr("a/", b"")
            archive.writestr("x" * 300, b"no picture")
            archive.writestr("none.png", bytes(200 << 20))  # 200 kB
        content = (folder / "all.zip").read_bytes()
        for number in range(6):
            (folder / f"{number}.zip").write_bytes(self.changed(content))

    def _webp_bomb(self) -> bytes:
        content = bytearray(picture((20, 12), "WEBP", "RGBA", lossless=True, exif=b"Exif\0\0"))
        content[24:30] = (16382).to_bytes(3, "little") * 2  # canvas of VP8X
        return bytes(content)

    def changed(self, content: bytes) -> bytes:
        """Flips bytes, cuts, doubles, or puts the beginning of another picture before the rest."""
        draw, changed = self.random, bytearray(content)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(changed)) if changed else 0
            match draw.randrange(6):
                case 0 | 1 if changed:
                    changed[min(at, draw.randrange(60)) if draw.random() < 0.7 else at] = draw.randrange(256)
                case 2:
                    del changed[at:]
                case 3:
                    changed[at:at] = changed[at : at + 200]
                case 4:
                    changed[:at] = draw.choice(self._originals)[:at]
                case 5:
                    changed[at : at + 4] = draw.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
        return bytes(changed)

    def image(self) -> Any:
        """What may stand for one image."""
        draw = self.random
        content = draw.choice(self._originals)
        content = self.changed(content) if draw.random() < 0.6 else content
        if draw.random() < 0.02:
            content = draw.choice(self._bombs)
        name = draw.choice(self._names) if draw.random() < 0.5 else "0.png"
        kinds = [content, content, {"bytes": content, "path": name}, {"bytes": None, "path": name}, name, name]
        odd = [
            None,
            3,
            [],
            {},
            {"bytes": "text"},
            {"path": 5},
            b"",
            "http://host/a.png",
            "data:image/png;base64,",
            float("nan"),
        ]
        return draw.choice(odd) if draw.random() < 0.05 else draw.choice(kinds)

    def row(self) -> dict[str, Any]:
        """One document of `format: chat`."""
        draw = self.random
        images = [self.image() for _ in range(draw.choice([0, 1, 1, 1, 2, 3]))]
        marks = len(images) if draw.random() < 0.85 else draw.randrange(4)
        pieces = ["<image>"] * marks if draw.random() < 0.8 else []
        words = ["what?", "", " ", "\n", "é\U0001f600", "<image", "a" * 200] + ["\ufdd0", "\ud800", IMAGE_TOKEN] * (
            draw.random() < 0.05
        )
        text = "".join(piece + draw.choice(words) for piece in [*pieces, ""])
        content: Any = text
        if draw.random() < 0.3:
            parts = [
                {"type": draw.choice(["image", "image_url"])} | ({"image": self.image()} if draw.random() < 0.3 else {})
                for _ in pieces
            ]
            content = [*parts, {"type": "text", "text": text.replace("<image>", "")}]
        talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat <image>"}]
        column: Any = images
        if draw.random() < 0.2:
            column = images[0] if images else None
        return {
            "messages": talk * draw.randint(1, 2) if not pieces else talk,
            "images": column,
            "tools": None,
            "system": None,
        }

    def settings(self) -> dict[str, Any]:
        """Keys of the section data."""
        draw = self.random
        archives = [str(self._folder / name) for name in ("all.zip", *(f"{number}.zip" for number in range(6)))]
        return {
            "bad_images": draw.choice(["error", "drop"]),
            "overlong": draw.choice(["error", "drop", "truncate"]),
            "loss_on": draw.choice(["response", "all"]),
            "images_directory": draw.choice([str(self._folder)] * 8 + archives + [None]),
        }


def outcome(row: dict[str, Any], settings: dict[str, Any]) -> str:
    """What became of a row: `read`, `dropped` or `refused`. Raises AssertionError if it is neither right nor one clear error."""
    config = DataSource(train="x", format="chat", images_column="images", sequence_length=LENGTH, **settings)
    try:
        encoder = Encoder(config, TOKENIZER, "data.train: x", EncoderMedia(TOKENS))
        samples = encoder.encode({name: [value] for name, value in row.items()}, 7)
    except DataError as error:
        text = str(error)
        assert "data." in text and "\n" not in text and len(text) < 2000 and error.__cause__ is None, text
        return "refused"
    for sample in samples:
        assert len(sample.input_ids) == len(sample.loss_mask) <= LENGTH and any(sample.loss_mask[1:])
        tokens = 0
        for image in sample.images:
            inside = slice(image.start, image.start + image.tokens)
            assert sample.input_ids[inside] == TOKENS.layout(image.width, image.height).ids.tolist()
            assert not any(sample.loss_mask[inside])
            tokens += sample.input_ids[inside].count(TOKENS.image_token_id)
        assert sample.input_ids.count(TOKENS.image_token_id) == tokens
    return "read" if samples else "dropped"


def main(count: int) -> None:
    """Feeds so many rows, and prints how many had which outcome, the slowest one's seconds, and the memory taken in MiB."""
    found, slowest = dict.fromkeys(("read", "dropped", "refused"), 0), 0.0
    with tempfile.TemporaryDirectory() as directory:
        mutator = Mutator(Path(directory))
        outcome(
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "images": None}, {}
        )
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))
        for _ in range(count):
            row, settings = mutator.row(), mutator.settings()
            start = time.process_time()
            found[outcome(row, settings)] += 1
            slowest = max(slowest, time.process_time() - start)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(json.dumps(found | {"slowest_s": slowest, "memory_mib": taken}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
