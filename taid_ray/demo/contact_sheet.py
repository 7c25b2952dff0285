"""A contact sheet: pictures with a question on each, and what models answered."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ENLARGED = 3
"""Pixels of the sheet for one of a picture, each way."""
LETTERS = 30
"""Of a line of text; they are about as wide as a picture of 56 pixels, enlarged."""
FONT, LINE, GAP = 12, 16, 14
"""Height of letters and of a line, and space between the entries, in pixels."""
INK, RIGHT, WRONG = (30, 30, 30), (20, 120, 40), (190, 30, 30)


class Entry(NamedTuple):
    """A picture of the sheet."""

    picture: bytes
    question: str
    answer: str
    """The right one."""
    answers: Mapping[str, str]
    """Those of the models, by their names."""


def contact_sheet(entries: Sequence[Entry], columns: int) -> Any:
    """Draws the entries row by row into a PIL image: pictures of one size, right answers in green and wrong ones in red."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT)
    texts = [_lines(entry) for entry in entries]
    first = Image.open(io.BytesIO(entries[0].picture))
    width, height = (ENLARGED * side for side in first.size)
    cell = (width + GAP, height + LINE * max(map(len, texts)) + GAP)
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, (entry, lines) in enumerate(zip(entries, texts, strict=True)):
        x, y = GAP + number % columns * cell[0], GAP + number // columns * cell[1]
        picture = Image.open(io.BytesIO(entry.picture))
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for line, (text, ink) in enumerate(lines):
            canvas.text((x, y + height + line * LINE), text, fill=ink, font=font)
    return sheet


def _lines(entry: Entry) -> list[tuple[str, tuple[int, int, int]]]:
    """The text below a picture, each line with its colour."""
    lines = [(line, INK) for line in textwrap.wrap(entry.question, LETTERS)]
    for name, answer in entry.answers.items():
        ink = RIGHT if answer == entry.answer else WRONG
        lines += [(line, ink) for line in textwrap.wrap(f"{name}: {answer or '-'}", LETTERS)]
    return lines
