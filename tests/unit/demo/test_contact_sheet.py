"""The contact sheet: every picture whole, right answers in green and wrong ones in red."""

import io

import numpy as np
from PIL import Image

from taid_ray.demo.contact_sheet import ENLARGED, GAP, RIGHT, WRONG, Entry, contact_sheet

SIZE = (56, 40)


def plain(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_stand_in_rows_with_coloured_answers_below() -> None:
    given = [("four", "four"), ("four", "two"), ("three", "two")]
    entries = [
        Entry(plain(100 + number), "how many objects are there in all of this?", "four", {"big": big, "small": small})
        for number, (big, small) in enumerate(given)
    ]
    sheet = np.asarray(contact_sheet(entries, columns=2))
    width, height = SIZE[0] * ENLARGED, SIZE[1] * ENLARGED
    cell_height = (sheet.shape[0] - GAP) // 2
    for number, colours in enumerate(([True, False], [True, True], [False, True])):
        x, y = GAP + number % 2 * (width + GAP), GAP + number // 2 * cell_height
        assert (sheet[y : y + height, x : x + width] == (100 + number, 0, 0)).all()
        text = sheet[y + height : y + cell_height, x : x + width].reshape(-1, 3)
        shown = [bool((text == ink).all(axis=1).any()) for ink in (RIGHT, WRONG)]
        assert shown == colours
    assert sheet.shape[1] == GAP + 2 * (width + GAP)
    below = sheet[GAP + cell_height :, GAP + width + GAP :]
    assert (below == 255).all()
