"""`taid-ray quickstart --vision`: its configuration, the scenes that it draws, and what is shown at its end."""

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from taid_ray.cli import quickstart as stories
from taid_ray.cli.picture_answers import scene_answers, shares_right
from taid_ray.config.models import StudentConfig
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.config.text import read_tree, set_key
from taid_ray.demo.contact_sheet import Entry, contact_sheet
from taid_ray.demo.scenes import KINDS, Talk, draw, held_out, talks, write_talks
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.pair import run_media
from taid_ray.models.student_init import build_student
from taid_ray.report.format import print_line
from taid_ray.run.directory import inspect_run_dir

SCENES = 1500
"""Scenes to train on, with up to five questions each."""
EACH = 100
"""Held-out scenes for each kind of question."""
SEED = 18
SHEET, SHEET_ROWS = "contact_sheet.png", 3
"""The contact sheet in the run directory: rows of pictures, with a column for each kind of question."""


def vision_config(overrides: Sequence[str], out: str | None) -> DistillConfig:
    """The shipped configuration with the package's own teacher, in a new run directory, on scenes that are drawn beside it."""
    tree = read_tree(stories.BUNDLE.parent / "configs" / "quickstart_vision.yaml")
    set_key(tree, "teacher.model", str(stories.BUNDLE / "vision"))
    set_key(tree, "out", time.strftime("runs/quickstart-vision-%Y%m%d-%H%M%S"))
    flags = {} if out is None else {"out": out}
    scenes = scenes_beside(build_config(tree, overrides, flags))
    for key, path in (
        ("train", scenes / "train.jsonl"),
        ("valid", scenes / "valid.jsonl"),
        ("images_directory", scenes),
    ):
        set_key(tree, f"data.{key}", str(path))
    return build_config(tree, overrides, flags)


def scenes_beside(config: DistillConfig) -> Path:
    """The directory of a run's scenes: a run directory must be empty before the run."""
    return config.run_dir.with_name(f"{config.run_dir.name}-scenes")


def made_scenes() -> tuple[list[Talk], list[Talk]]:
    """Makes the scenes to train on and the held-out ones, always the same."""
    rng = random.Random(SEED)
    train = talks(SCENES, rng)
    return train, held_out(EACH, rng, {scene for scene, _ in train})


def draw_scenes(config: DistillConfig) -> None:
    """Draws the scenes of a run, or draws them again as they were. Raises ConfigError if there can be no such run."""
    inspect_run_dir(config)
    for made, name in zip(made_scenes(), ("train", "valid"), strict=True):
        write_talks(made, scenes_beside(config) / f"{name}.jsonl")


def show_answers(config: DistillConfig, console: Console) -> None:
    """Prints how many questions on held-out scenes each model answers rightly, with and without the pictures; draws some."""
    media, (_, asked) = run_media(config), made_scenes()
    assert media is not None
    seen: dict[str, list[str]] = {}
    blind: dict[str, list[str]] = {}
    for name, model in _models(config).items():
        seen[name], blind[name] = (scene_answers(model, media.processor, asked, grey) for grey in (False, True))
    console.print(answer_table(asked, seen, blind))
    sheet = config.run_dir / SHEET
    contact_sheet(_entries(asked, seen), len(KINDS)).save(sheet)
    print_line(console, f"some of the pictures with the answers: {sheet}")


def _models(config: DistillConfig) -> dict[str, Any]:
    """The teacher, if there is one, the student before and the student after, by the names that are shown."""
    options: dict[str, Any] = {"dtype": "float32", "images": True}
    models = {"teacher": load_causal_lm(config.teacher, **options)} if config.teacher else {}
    after = StudentConfig(model=str(config.run_dir / "model"))
    return models | {"student before": build_student(config, None), "student after": load_causal_lm(after, **options)}


def answer_table(asked: Sequence[Talk], seen: Mapping[str, list[str]], blind: Mapping[str, list[str]]) -> Table:
    """Makes two rows for each model: the shares of right answers with the pictures, and with grey ones in their place."""
    table = Table(title=f"Right answers to {len(asked)} questions on held-out scenes")
    table.add_column("")
    table.add_column("pictures")
    for kind in (*KINDS, "all"):
        table.add_column(kind, justify="right")
    for name in seen:
        for shown, answers in (("shown", seen[name]), ("grey", blind[name])):
            shares = shares_right(asked, answers)
            table.add_row(name if shown == "shown" else "", shown, *(f"{share:.0%}" for share in shares.values()))
    return table


def _entries(asked: Sequence[Talk], seen: Mapping[str, list[str]]) -> list[Entry]:
    """The first scenes, kind by kind, for the contact sheet."""
    entries = []
    for number, (scene, (question, *_)) in enumerate(asked[: SHEET_ROWS * len(KINDS)]):
        answers = {name: found[number] for name, found in seen.items()}
        entries.append(Entry(draw(scene), question.text, question.answer, answers))
    return entries
