"""`taid-ray quickstart --vision`: its teacher sees, its scenes are trained on as they are meant, and its table counts rightly."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from taid_ray.cli import app as cli
from taid_ray.cli import quickstart_vision as example
from taid_ray.cli.picture_answers import answers, scene_answers, shares_right
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import NO_LABEL
from taid_ray.data.dataset import validation_rows
from taid_ray.data.run_images import RunImages
from taid_ray.demo.scenes import KINDS, SIDE, draw
from taid_ray.media.processor import grey_picture
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.pair import run_media, run_tokenizer
from tests.support.paths import BUNDLE

TEACHER = BUNDLE / "vision"
CLOSE = 0.03
"""Shares of right answers may differ so far between machines."""


def config_in(directory: Path) -> DistillConfig:
    return example.vision_config(["data.pack=false"], str(directory / "run"))


@cache
def teacher() -> Any:
    return load_causal_lm(config_in(Path("/absent")).given_teacher, images=True)


@cache
def processor() -> Any:
    media = run_media(config_in(Path("/absent")))
    assert media is not None
    return media.processor


def test_the_bundled_teacher_is_small_and_answers_as_its_file_says() -> None:
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 4_000_000
    said = json.loads((TEACHER / "accuracy.json").read_text(encoding="utf-8"))
    _, asked = example.made_scenes()
    for name, grey in (("shown", False), ("grey", True)):
        found = shares_right(asked, scene_answers(teacher(), processor(), asked, grey))
        assert found == pytest.approx(said[name], abs=CLOSE)
    assert said["shown"]["all"] > 0.8
    assert said["grey"]["all"] < 0.5
    assert min(said["shown"][kind] - said["grey"][kind] for kind in KINDS) > 0.3


def test_questions_that_are_answered_together_are_answered_as_alone() -> None:
    asked = example.made_scenes()[1][:10]
    pictures = [draw(scene) for scene, _ in asked[:9]] + [grey_picture(SIDE, SIDE)]
    questions = [question.text for _, (question, *_) in asked]
    found = answers(teacher(), processor(), pictures, questions)
    alone = [
        answers(teacher(), processor(), [picture], [text])[0] for picture, text in zip(pictures, questions, strict=True)
    ]
    assert found == alone


def test_the_rows_carry_loss_on_the_answers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "SCENES", 3)
    monkeypatch.setattr(example, "EACH", 1)
    config = config_in(tmp_path)
    example.draw_scenes(config)
    media = run_media(config)
    assert media is not None
    images, tokenizer = RunImages(media), run_tokenizer(config)
    rows = validation_rows(config.data.sources[0], tokenizer, media=images.encoder_media)
    train, held_out = example.made_scenes()
    wanted = [question.answer for _, questions in held_out for question in questions]
    assert len(wanted) == len(KINDS)
    learnt = [tokenizer.decode(row.targets[row.targets != NO_LABEL]) for row in rows]
    assert learnt == [f"{answer} <|end|>" for answer in wanted]
    assert tokenizer.unk_token_id not in [token for row in rows for token in row.input_ids]
    shown = [images.read(image) for row in rows for image in row.images]
    assert shown == [draw(scene) for scene, _ in held_out]
    written = (tmp_path / "run-scenes/train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(written) == len(train) == 3


def test_the_table_has_shares_of_right_answers_by_kind() -> None:
    asked = example.made_scenes()[1][: 2 * len(KINDS)]
    right = [questions[0].answer for _, questions in asked]
    half = [answer if number < len(KINDS) else "no" for number, answer in enumerate(right)]
    assert shares_right(asked, right) == dict.fromkeys((*KINDS, "all"), 1.0)
    assert shares_right(asked, half) == dict.fromkeys((*KINDS, "all"), 0.5)
    assert shares_right(asked, [right[0], *["no"] * 9])["all"] == 0.1
    console = Console(width=120, record=True)
    console.print(example.answer_table(asked, {"teacher": right}, {"teacher": half}))
    shown, grey = (line.split() for line in console.export_text().splitlines() if "%" in line)
    assert [word for word in shown if "%" in word] == ["100%"] * 6
    assert [word for word in grey if "%" in word] == ["50%"] * 6


def test_scenes_are_drawn_before_the_run_and_answers_shown_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        cli, "run", lambda config: seen.append((example.scenes_beside(config) / "valid.jsonl").exists())
    )
    monkeypatch.setattr(example, "SCENES", 2)
    monkeypatch.setattr(example, "show_answers", lambda config, console: seen.append(config))
    result = CliRunner().invoke(cli.app, ["quickstart", "--vision", "--out", str(tmp_path / "run"), "train.steps=70"])
    assert result.exit_code == 0, result.output
    drawn, config = seen
    assert drawn
    assert (config.train.steps, config.run_dir) == (70, tmp_path / "run")
    assert config.given_teacher.model == str(TEACHER)
