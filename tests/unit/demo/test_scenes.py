"""Drawn scenes: what is asked about them can be seen in the pictures."""

import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taid_ray.demo.scenes import COLOURS, KINDS, NUMBERS, PAPER, PLACES, SIDE, draw, held_out, talks, write_talks

TRAIN = talks(200, random.Random(0))
HELD_OUT = held_out(8, random.Random(1), {scene for scene, _ in TRAIN})
SHAPE_BY_AREA = {0.5: "triangle", 0.79: "circle", 1.0: "square"}
"""By the share of its bounding box that a shape fills."""


def seen(picture: bytes) -> dict[int, str]:
    """The object in each place that has one, by nothing but the pixels."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    assert pixels.shape == (SIDE, SIDE, 3)
    half, found = SIDE // 2, {}
    for place in range(4):
        quarter = pixels[place // 2 * half :, place % 2 * half :][:half, :half]
        drawn = (quarter != PAPER).any(axis=-1)
        if drawn.any():
            (colour,) = {name for name, rgb in COLOURS.items() if (quarter[drawn] == rgb).all()}
            rows, columns = np.nonzero(drawn)
            share = drawn.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
            area = min(SHAPE_BY_AREA, key=lambda each: abs(each - share))
            found[place] = f"{colour} {SHAPE_BY_AREA[area]}"
    return found


def answer(question: str, objects: dict[int, str]) -> str:
    """What is to be said to a question on a scene of these objects."""

    def one(words: str) -> tuple[int, str]:
        pattern = words.replace("object", r"\w+") if " " in words else rf"\w+ {words}"
        (match,) = [(place, name) for place, name in objects.items() if re.fullmatch(pattern, name)]
        return match

    if match := re.fullmatch(r"how many (\w+)s are there\?", question):
        return NUMBERS[sum(match[1] in ("object", name.split()[1]) for name in objects.values())]
    if match := re.fullmatch(r"what colour is the (\w+)\?", question):
        return one(match[1])[1].split()[0]
    if match := re.fullmatch(r"what shape is the (\w+) object\?", question):
        return one(f"{match[1]} object")[1].split()[1]
    if match := re.fullmatch(r"where is the (.+)\?", question):
        return PLACES[one(match[1])[0]]
    match = re.fullmatch(r"what is (.+) the (.+)\?", question)
    assert match, question
    step = {"to the left of": -1, "to the right of": 1, "above": -2, "below": 2}[match[1]]
    return f"a {objects[one(match[2])[0] + step]}"


@pytest.mark.parametrize("made", [TRAIN, HELD_OUT], ids=["train", "held out"])
def test_every_answer_can_be_read_off_the_picture(made: list) -> None:  # type: ignore[type-arg]
    for scene, questions in made:
        objects = seen(draw(scene))
        assert objects == {thing.place: thing.name for thing in scene}
        for question in questions:
            assert answer(question.text, objects) == question.answer


def test_scenes_are_the_same_from_the_same_seed_and_held_out_ones_are_not_trained_on() -> None:
    assert talks(200, random.Random(0)) == TRAIN
    assert talks(200, random.Random(2)) != TRAIN
    assert not {scene for scene, _ in TRAIN} & {scene for scene, _ in HELD_OUT}
    known = {scene for scene, _ in held_out(8, random.Random(1), ())[:20]}
    assert not known & {scene for scene, _ in held_out(8, random.Random(1), known)}


def test_there_are_questions_of_all_kinds_on_one_to_four_objects() -> None:
    assert [questions[0].kind for _, questions in HELD_OUT] == list(KINDS) * 8
    assert {len(scene) for scene, _ in TRAIN} == {1, 2, 3, 4}
    for kind in KINDS:
        answers = {question.answer for _, questions in TRAIN for question in questions if question.kind == kind}
        assert len(answers) >= 3, kind


def test_rows_name_the_pictures_beside_them(tmp_path: Path) -> None:
    write_talks(TRAIN[:3], tmp_path / "some.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, (scene, questions) in zip(rows, TRAIN[:3], strict=True):
        assert (tmp_path / row["image"]).read_bytes() == draw(scene)
        contents = [message["content"] for message in row["messages"]]
        asked = [text for question in questions for text in (question.text, question.answer)]
        assert contents == [f"<image>{asked[0]}", *asked[1:]]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * len(questions)
