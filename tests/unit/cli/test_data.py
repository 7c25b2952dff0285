"""`taid-ray data show`, and the two rows at the end of `check`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from taid_ray.cli.app import app
from taid_ray.cli.data import print_samples
from taid_ray.config.schema import load_config
from taid_ray.data.preview import Part, SamplePreview
from taid_ray.driver import preflight
from tests.support.images import picture
from tests.support.paths import BUNDLE
from tests.support.store import prepare_here
from tests.support.tiny_vision import save_tiny

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(1, 6)]


@pytest.fixture
def config(tmp_path: Path) -> str:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    stories = str(BUNDLE / "stories260k")
    tree: dict[str, Any] = {
        "teacher": {"model": stories},
        "student": {"init": "cut", "layers": [0, 4], "dtype": "float32"},
        "data": {"train": str(data), "format": "prompt_response", "valid_documents": 1, "sequence_length": 64},
        "train": {"steps": 1, "batch_size": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_json_lists_the_rows_with_what_carries_loss(config: str) -> None:
    found = json.loads(printed("data", "show", config, "--rows", "2", "--json"))
    assert [row["row"] for row in found] == [2, 3]  # row 1 is for validation
    assert found[0]["text"] == "<s> question 2\nanswer 2</s>"
    assert found[0]["loss_text"] == ["answer 2</s>"]
    assert found[0]["tokens"] > found[0]["loss_tokens"] > 2


def test_overrides_apply(config: str) -> None:
    (row,) = json.loads(printed("data", "show", config, "data.loss_on=all", "--rows", "1", "--json"))
    assert row["loss_text"] == [" question 2\nanswer 2</s>"]


def test_fewer_rows_than_asked_for_are_all_rows(config: str) -> None:
    assert len(json.loads(printed("data", "show", config, "--rows", "99", "--json"))) == 4


def test_without_colours_marks_stand_around_what_carries_loss(config: str) -> None:
    shown = printed("data", "show", config)
    assert "<s> question 2\n⟦answer 2</s>⟧" in shown
    assert "the first document is kept for validation" in shown


def test_check_ends_with_two_rows(config: str) -> None:
    shown = printed("check", config)
    assert shown.startswith("ok: 1 optimizer steps")
    assert "⟦answer 2</s>⟧" in shown and shown.rstrip().endswith("⟦answer 3</s>⟧")


def test_what_data_hold_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [Part("[red]a\x1b[2J", False), Part("b\x07\n日", True)]
    print_samples(Console(force_terminal=True, color_system="standard"), [SamplePreview(1, parts, 2, 1)])
    shown = capsys.readouterr().out
    assert "[red]a\\x1b[2J" in shown and "b\\x07" in shown and "\x07" not in shown and "日" in shown
    assert "\x1b[1;32m" in shown and "⟦" not in shown


def test_long_parts_are_shortened_in_the_middle(capsys: pytest.CaptureFixture[str]) -> None:
    long = SamplePreview(1, [Part("a" * 300 + "b" * 300, True)], 600, 599)
    print_samples(Console(), [long], shorten=True)
    shown = capsys.readouterr().out
    assert f"{'a' * 200} [... 200 characters ...] {'b' * 200}" in shown


def test_images_are_shown_by_their_sizes_and_files(tmp_path: Path) -> None:
    save_tiny("llava", tmp_path / "model")
    (tmp_path / "cat.png").write_bytes(picture((40, 30)))
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"conversations": talk, "image": "cat.png"}) + "\n" for _ in range(3))
    )
    model, data = (
        {"model": str(tmp_path / "model")},
        {"train": str(tmp_path / "d.jsonl"), "images_directory": str(tmp_path)},
    )
    tree = {
        "teacher": model,
        "student": model,
        "data": data | {"format": "chat", "images_column": "images", "valid_documents": 1, "sequence_length": 64},
        "train": {"steps": 1, "batch_size": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))

    shown = printed("data", "show", str(file), "--rows", "1")
    assert "[image 40x30]" in shown and "⟦a cat<|im_end|>" in shown and shown.rstrip().endswith("image 1: cat.png")
    (row,) = json.loads(printed("data", "show", str(file), "--rows", "1", "--json"))
    assert row["images"] == ["cat.png"] and "[image 40x30]" in row["text"]

    loaded = load_config(file)
    rows = prepare_here(loaded).stored_rows().read(np.arange(1))
    assert [image.place for image in rows[0].images] == [f"file:{tmp_path}/cat.png"]
    assert preflight.prepare(loaded).data.valid_rows == 1
