"""A loss that is not finite ends the run: what caused it would only come again. Nothing here replaces product code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import BUNDLE, NewRun, Run, Tree, small_config

BAD_DOCUMENT = 62
"""Of the training data, by its number from 1; the order of the default seed brings it at step 26, after some checkpoints."""


def poisoned_student(path: Path) -> str:
    """The bundled model, whose embedding of one byte that stands in no story is not finite."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(BUNDLE / "stories260k", tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLE / "stories260k")
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
        model.get_input_embeddings().weight[tokenizer("漢", add_special_tokens=False)["input_ids"][-1]] = float("inf")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def documents(path: Path) -> str:
    """Stories, and BAD_DOCUMENT with the byte in it."""
    lines = (BUNDLE / "tinystories_train.jsonl").read_text(encoding="utf-8").splitlines()[:160]
    lines[BAD_DOCUMENT - 1] = json.dumps({"text": "A short story about 漢, which nobody had read before."})
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def check_ended(run: Run) -> re.Match[str]:
    """One attempt, exit 2 and one message; the steps before it are on file. Returns where the message names what."""
    steps = [line["step"] for line in run.lines()]
    text = " ".join(run.log.split())
    found = re.search(
        r"error:? .*step (\d+).*from documents ([\d, .]+) of data\.train.*checkpoint is of step (\d+)", text
    )
    assert found and "Traceback" not in text, run.log
    assert run.attempts == 1
    failed, good = int(found[1]), int(found[3])
    assert steps == list(range(1, failed))
    assert good == (failed - 1) // 4 * 4 > 0
    assert [path for path in (run.dir / "checkpoints").iterdir() if f"step-{good:09d}" in path.name]
    assert not (run.dir / "summary.json").exists()
    run.check_nothing_left()
    return found


@pytest.mark.more
@pytest.mark.timeout(900)
def test_a_document_that_makes_the_loss_nan(new_run: NewRun, tmp_path: Path) -> None:
    config: Tree = small_config(
        "nan",
        data={"train": documents(tmp_path / "train.jsonl")},
        student={"init": "pretrained", "model": poisoned_student(tmp_path / "student"), "layers": None},
    )
    run = new_run(config)
    run.start()
    run.wait_for_end(2)
    found = check_ended(run)
    named = [int(number) for number in re.findall(r"\d+", found[2])]
    assert BAD_DOCUMENT in named and len(named) < 25, named


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_settings_that_make_the_weights_explode(new_run: NewRun) -> None:
    """Decay of 4 per step turns every matrix round and makes it 3 times as large."""
    run = new_run(small_config("explode", train={"weight_decay": 2e3, "learning_rate": 2e-3, "max_grad_norm": 0.0}))
    run.start()
    run.wait_for_end(2)
    check_ended(run)
