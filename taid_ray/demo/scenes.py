"""Drawn scenes of a few objects, with questions that only who sees them can answer, for `taid-ray quickstart --vision`."""

import io
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from taid_ray.files import write_lines

SIDE = 56
"""Width and height of a picture in pixels."""
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (235, 200, 30),
    "purple": (140, 60, 170),
}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
"""The four quarters of a picture, each with room for one object."""
NUMBERS = ("zero", "one", "two", "three", "four")
PAPER = (245, 245, 240)
BESIDE: dict[str, Callable[[int], int | None]] = {
    "to the left of": lambda place: place - 1 if place % 2 else None,
    "to the right of": lambda place: None if place % 2 else place + 1,
    "above": lambda place: place - 2 if place >= 2 else None,
    "below": lambda place: None if place >= 2 else place + 2,
}
"""By its words: which place stands in a relation to another one; None where that is outside of the picture."""


@dataclass(frozen=True)
class Thing:
    """An object of a scene."""

    colour: str
    shape: str
    place: int
    """Index into PLACES."""
    x: int
    y: int
    """Its middle, in pixels from the left and from the top."""
    radius: int

    @property
    def name(self) -> str:
        """Its colour and shape, which no other object of the scene has both."""
        return f"{self.colour} {self.shape}"


Scene = tuple[Thing, ...]
"""Its objects, in the order of their places."""


class Question(NamedTuple):
    """A question on a scene."""

    kind: str
    """One of KINDS."""
    text: str
    answer: str


def make_scene(rng: random.Random) -> Scene:
    """Chooses one to four objects, no two of the same colour and shape, each somewhere in a place of its own."""
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], rng.randint(1, 4))
    places = sorted(rng.sample(range(len(PLACES)), len(kinds)))
    scene = []
    for (colour, shape), place in zip(kinds, places, strict=True):
        x, y = (SIDE // 4 + side * SIDE // 2 + rng.randint(-2, 2) for side in (place % 2, place // 2))
        scene.append(Thing(colour, shape, place, x, y, rng.randint(8, 11)))
    return tuple(scene)


def draw(scene: Scene) -> bytes:
    """Draws a scene as a PNG of SIDE x SIDE pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    canvas = ImageDraw.Draw(image)
    for thing in scene:
        x, y, r = thing.x, thing.y, thing.radius
        box, colour = (x - r, y - r, x + r, y + r), COLOURS[thing.colour]
        if thing.shape == "circle":
            canvas.ellipse(box, fill=colour)
        elif thing.shape == "square":
            canvas.rectangle(box, fill=colour)
        else:
            canvas.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _count(scene: Scene, rng: random.Random) -> Question | None:
    if rng.random() < 0.5:
        return Question("count", "how many objects are there?", NUMBERS[len(scene)])
    shape = rng.choice(SHAPES)
    number = sum(thing.shape == shape for thing in scene)
    return Question("count", f"how many {shape}s are there?", NUMBERS[number])


def _only(scene: Scene, trait: str) -> list[Thing]:
    """Lists the objects whose `colour` or `shape`, as `trait` says, no other object of the scene has."""
    values = [getattr(thing, trait) for thing in scene]
    return [thing for thing, value in zip(scene, values, strict=True) if values.count(value) == 1]


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    alone = _only(scene, "shape")
    if not alone:
        return None
    thing = rng.choice(alone)
    return Question("colour", f"what colour is the {thing.shape}?", thing.colour)


def _shape(scene: Scene, rng: random.Random) -> Question | None:
    alone = _only(scene, "colour")
    if not alone:
        return None
    thing = rng.choice(alone)
    return Question("shape", f"what shape is the {thing.colour} object?", thing.shape)


def _called(thing: Thing, scene: Scene, rng: random.Random) -> str:
    """Chooses words that mean this object and no other one of the scene."""
    names = [thing.name]
    if thing in _only(scene, "shape"):
        names.append(thing.shape)
    if thing in _only(scene, "colour"):
        names.append(f"{thing.colour} object")
    return rng.choice(names)


def _place(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene)
    return Question("place", f"where is the {_called(thing, scene, rng)}?", PLACES[thing.place])


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    at: dict[int | None, Thing] = {thing.place: thing for thing in scene}
    pairs = [
        (at[beside(thing.place)], words, thing)
        for thing in scene
        for words, beside in BESIDE.items()
        if beside(thing.place) in at
    ]
    if not pairs:
        return None
    other, words, thing = rng.choice(pairs)
    return Question("relation", f"what is {words} the {_called(thing, scene, rng)}?", f"a {other.name}")


KINDS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "place": _place,
    "relation": _relation,
}
"""How a question of each kind is asked on a scene; None where the scene allows none."""


Talk = tuple[Scene, list[Question]]
"""A scene with the questions on it, in the order in which they are asked."""


def talks(count: int, rng: random.Random) -> list[Talk]:
    """Makes `count` scenes, each with a question of every kind that it allows, in random order."""
    made = []
    for _ in range(count):
        scene = make_scene(rng)
        asked = [KINDS[kind](scene, rng) for kind in rng.sample(list(KINDS), len(KINDS))]
        made.append((scene, [question for question in asked if question is not None]))
    return made


def held_out(each: int, rng: random.Random, known: Container[Scene]) -> list[Talk]:
    """Makes scenes that are not among the `known` ones, with one question each: `each` of every kind, the kinds in turn."""
    made: list[Talk] = []
    while len(made) < each * len(KINDS):
        scene = make_scene(rng)
        question = list(KINDS.values())[len(made) % len(KINDS)](scene, rng)
        if question is not None and scene not in known:
            made.append((scene, [question]))
    return made


def write_talks(made: Sequence[Talk], path: Path) -> None:
    """Writes conversations as rows of the format `chat` into a JSONL file, and their pictures into the folder beside it.

    The folder has the file's name without its ending; the rows name pictures relative to the file.
    """
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (scene, questions) in enumerate(made):
        picture = pictures / f"{number:05}.png"
        picture.write_bytes(draw(scene))
        messages: list[dict[str, str]] = []
        for question in questions:
            mark = "" if messages else "<image>"
            messages += [
                {"role": "user", "content": f"{mark}{question.text}"},
                {"role": "assistant", "content": question.answer},
            ]
        rows.append({"image": f"{pictures.name}/{picture.name}", "messages": messages})
    write_lines(path, rows)
