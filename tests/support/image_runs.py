"""Data with images for tests of whole runs: chats with no, one and several images, which lie beside them as files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from taid_ray.data.batch import Row
from taid_ray.media.opening import open_image
from taid_ray.media.processor import drawn
from taid_ray.models.pair import image_backend
from tests.support.tiny_vision import mark_of, tiny_media

SIZES: list[list[tuple[int, int]]] = [[], [(30, 40)], [(28, 28), (60, 30), (90, 31)]]
"""Sizes of the images of the rows, in turn."""


def write_image_rows(directory: Path, count: int = 12) -> None:
    """Writes rows.jsonl, and the images into pictures."""
    (directory / "pictures").mkdir(parents=True)
    lines = []
    for number in range(count):
        names = []
        for place, (width, height) in enumerate(SIZES[number % 3]):
            names.append(f"{number}_{place}.png")
            (directory / "pictures" / names[-1]).write_bytes(drawn(width, height + number))
        lines.append({"messages": chat(number, "<image>"), "images": names})
    (directory / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def image_keys(directory: Path) -> dict[str, Any]:
    """The keys of the section data that name what `write_image_rows` wrote into `directory`."""
    return {
        "train": str(directory / "rows.jsonl"),
        "images_directory": str(directory / "pictures"),
        "format": "chat",
        "images_column": "images",
    }


def chat(number: int, mark: str) -> list[dict[str, str]]:
    """The conversation of a row, from 0. mark: stands for an image."""
    marks = " and ".join([mark] * len(SIZES[number % 3]))
    return [
        {"role": "user", "content": f"{marks} what is it?"},
        {"role": "assistant", "content": f"A cat, {number}. It saw the dog."},
    ]


def documents_by_transformers(
    family: str, directory: Path, row: Row
) -> Iterator[tuple[dict[str, Tensor], NDArray[np.int64]]]:
    """The model inputs of each document of a row as transformers' own processor makes them of its text and images, alone.

    Yields them with the document's targets. Asserts that the ids are those of the row. directory: of `write_image_rows`.
    """
    processor = tiny_media(family, image_backend()).processor
    starts = [*np.flatnonzero(row.position_ids == 0).tolist(), len(row.input_ids)]
    for document, start, stop in zip(row.documents, starts, starts[1:], strict=False):
        number = document - 1
        text = processor.tokenizer.apply_chat_template(chat(number, mark_of(family)), tokenize=False)
        images = [
            open_image((directory / "pictures" / f"{number}_{place}.png").read_bytes(), width, height + number, "")
            for place, (width, height) in enumerate(SIZES[number % 3])
        ]
        shown = {"images": [images]} if images else {}
        inputs = dict(processor(text=[text], **shown, return_tensors="pt", add_special_tokens=False))
        assert inputs["input_ids"][0].tolist() == row.input_ids[start:stop].tolist()
        yield inputs, row.targets[start:stop]
