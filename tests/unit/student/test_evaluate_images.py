"""`taid-ray eval` on chats with images: the figures are those of transformers' own processors and models, one row at a time."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from torch.nn.functional import kl_div

from taid_ray.cli import app as cli
from taid_ray.errors import ConfigError, DataError, ModelError
from taid_ray.media.opening import open_image
from taid_ray.media.processor import drawn
from taid_ray.models.pair import image_backend
from taid_ray.student import generation
from taid_ray.student.evaluate import evaluate_model
from tests.support.paths import BUNDLE
from tests.support.tiny_vision import save_tiny, tiny_model, tiny_processor

ROWS = [[(30, 40)], [], [(28, 28), (60, 30), (50, 90)], [(90, 31)]]
"""Sizes of the images of the rows."""
KEYS = ["data.format=chat", "data.images_column=images", "data.sequence_length=160"]


def write_rows(directory: Path) -> str:
    """Rows of chats whose images are files beside them, or bytes in the row itself."""
    rows = []
    for number, sizes in enumerate(ROWS):
        images: list[dict[str, Any]] = []
        for place, size in enumerate(sizes):
            if place == 1:
                images.append({"bytes": drawn(*size), "path": None})
            else:
                images.append({"bytes": None, "path": f"{number}_{place}.png"})
                (directory / f"{number}_{place}.png").write_bytes(drawn(*size))
        rows.append({"messages": messages(number), "images": images})
    parquet.write_table(pa.Table.from_pylist(rows), directory / "rows.parquet")
    return str(directory / "rows.parquet")


def messages(number: int) -> list[dict[str, str]]:
    asked = "<image> and ".join([""] * len(ROWS[number]) + ["what is it?"])
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": f"A dog, {number}."}]


def inputs_of(processor: Any, number: int) -> tuple[Any, int]:
    """What transformers makes of a row, and the number of tokens in front of its answer."""
    asked, answer = messages(number)
    text = asked["content"].replace("<image>", _mark(processor))
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    pixels = [open_image(drawn(*size), *size, "") for size in ROWS[number]]
    shown = {"images": [pixels]} if pixels else {}
    whole, short = (
        processor(text=[each], **shown, return_tensors="pt", add_special_tokens=False)
        for each in (f"{prompt}{answer['content']}<|im_end|>\n", prompt)
    )
    return whole, short["input_ids"].shape[1]


def _mark(processor: Any) -> str:
    return "<|vision_start|><|image_pad|><|vision_end|>" if "Qwen" in type(processor).__name__ else "<image>"


@pytest.mark.parametrize("name", ["qwen2_5_vl", pytest.param("llava", marks=pytest.mark.more)])
def test_figures_equal_those_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "NEW_TOKENS", 2)
    teacher, student = (save_tiny(name, tmp_path / str(seed), seed) for seed in (0, 1))
    data, keys = write_rows(tmp_path), [*KEYS, f"data.images_directory={tmp_path}"]
    found = evaluate_model(str(student), str(teacher), data, keys, rouge=True)

    processor, models = tiny_processor(name, image_backend()), [tiny_model(name, seed) for seed in (0, 1)]
    shared = len(processor.tokenizer)  # the models have some rows more
    cross_entropy, kl, tokens = [0.0, 0.0], 0.0, 0
    for number in range(len(ROWS)):
        inputs, start = inputs_of(processor, number)
        labels = inputs["input_ids"][0, start:]
        with torch.no_grad():
            p, q = (model(**inputs).logits[0, start - 1 : -1, :shared].double().log_softmax(-1) for model in models)
        cross_entropy = [
            total - float(side.gather(1, labels[:, None]).sum())
            for total, side in zip(cross_entropy, (p, q), strict=True)
        ]
        kl += float(kl_div(q, p, log_target=True, reduction="sum"))
        tokens += len(labels)
    assert found.tokens == tokens
    assert found.teacher_cross_entropy == pytest.approx(cross_entropy[0] / tokens, abs=1e-5)
    assert found.cross_entropy == pytest.approx(cross_entropy[1] / tokens, abs=1e-5)
    assert found.kl == pytest.approx(kl / tokens, abs=1e-5) and found.kl > 1e-3
    assert found.answers["exact match"] == (0.0, 0.0) and found.answers.keys() == {"ROUGE-L", "exact match"}
    measured = f"median of {sum(map(bool, ROWS))} rows"
    for who, note in zip(("model", "teacher"), found.notes, strict=True):
        assert f"with grey images the {who}'s answers differ by " in note and measured in note

    arguments = [student, "--teacher", teacher, "--data", data, *(key.removeprefix("data.") for key in keys)]
    monkeypatch.setattr(sys, "argv", ["taid-ray", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert not ended.value.code and f"{found.cross_entropy:.4f}" in shown and all(note in shown for note in found.notes)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llava", tmp_path_factory.mktemp("llava") / "model"))


def test_keys_that_cannot_be_meant_are_refused(llava: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": messages(1), "images": []}) + "\n")

    def refused(kind: type[Exception], match: str, *keys: str, model: str = llava) -> None:
        with pytest.raises(kind, match=match):
            evaluate_model(model, llava, str(data), list(keys), rouge=False)

    refused(ConfigError, r"data\.images_column needs format: chat", "data.images_column=images")
    refused(
        ModelError,
        r"data\.image_processor: .* no setting 'max_patches'",
        *KEYS,
        "data.image_processor={max_patches: 2}",
    )
    refused(ModelError, r"student\.model: .* type llama", *KEYS, model=str(BUNDLE / "stories260k"))
    refused(DataError, r"none of the 1 validation rows has an image", *KEYS)
    refused(DataError, r"data\.images_directory: nowhere is no folder", *KEYS, "data.images_directory=nowhere")


def test_a_model_that_does_not_look_at_its_images_is_refused(llava: str, tmp_path: Path) -> None:
    """Its figures would be those of a model of text."""
    model = tiny_model("llava")
    torch.nn.init.zeros_(model.model.multi_modal_projector.linear_2.weight)
    model.save_pretrained(tmp_path / "blind")
    tiny_processor("llava").save_pretrained(tmp_path / "blind")
    keys = [*KEYS, f"data.images_directory={tmp_path}"]
    with pytest.raises(ModelError, match=r"student\.model: LlavaForConditionalGeneration does not look at its images"):
        evaluate_model(str(tmp_path / "blind"), llava, write_rows(tmp_path), keys, rouge=False)
