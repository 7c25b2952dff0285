"""`taid-ray plan` in a run with images: beside what tiny models really have, keep and compute."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from taid_ray.cli.plan import image_numbers
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.distributed.capacity import check_object_store
from taid_ray.errors import ClusterError, ConfigError
from taid_ray.models.freezing import freeze
from taid_ray.models.head import hidden_states
from taid_ray.plan import rates as plan_rates
from taid_ray.plan.forecast import forecast
from taid_ray.plan.hardware import hardware_named
from taid_ray.plan.images import BYTES_PER_PIXEL, row_images
from taid_ray.plan.inputs import PlanInputs, read_models
from taid_ray.plan.tables import show
from taid_ray.plan.trace import LiveBytes, shape_of
from tests.support.tiny_vision import content_of, row_ids, save_tiny, tiny_config, tiny_media, tiny_model

SIZE, PER_ROW, LENGTH = (60, 30), 2, 48
TOWER = ("vision_tower", "multi_modal_projector")


@pytest.fixture(autouse=True)
def few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands take seconds to simulate."""
    monkeypatch.setattr(plan_rates, "WORKERS", (1, 4))


def config_of(model: Path, **student: Any) -> DistillConfig:
    return build_config(
        {
            "teacher": {"model": str(model), "window": 3, "dtype": "float32"},
            "student": {"model": str(model), "dtype": "float32"} | student,
            "data": {"train": "rows.jsonl", "format": "chat", "images_column": "images", "sequence_length": LENGTH},
            "train": {"steps": 4, "batch_size": 2, "micro_batch_size": 2},
        }
    )


def inputs_of(config: DistillConfig, size: tuple[int, int] = SIZE, per_row: int = PER_ROW) -> PlanInputs:
    models = read_models(config)
    images = row_images(config, models.teacher, models.student, size, per_row)
    return PlanInputs(config, models, hardware_named("cpu"), images)


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("internvl", tmp_path_factory.mktemp("internvl") / "model")


def real_inputs(name: str, rows: int) -> dict[str, torch.Tensor]:
    """Full rows of two documents, PER_ROW images of SIZE in the first one, as the model takes them."""
    media = tiny_media(name)
    ids, images = row_ids(media, *[SIZE] * PER_ROW)
    ids += [7] * (LENGTH - len(ids))
    pictures = [[media.picture(image, content_of(image)) for image in images]] * rows
    positions = torch.arange(LENGTH // 2).repeat(2).expand(rows, -1)
    return media.inputs(torch.tensor([ids] * rows), positions, pictures)


@pytest.mark.parametrize(
    "frozen", [["vision_tower"], *(pytest.param(names, marks=pytest.mark.more) for names in ([], [*TOWER]))]
)
def test_frozen_parts_take_no_optimizer_memory(internvl: Path, frozen: list[str]) -> None:
    model = tiny_model("internvl")
    freeze(model, frozen)
    shape = shape_of(tiny_config("internvl"), images=True, freeze=frozen)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.trained == trained and shape.parameters == model.num_parameters()
    language = {id(p) for p in [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]}
    vision = [p for p in model.parameters() if id(p) not in language and p.dim() >= 2]
    assert shape.vision == sum(p.numel() for p in vision)
    assert shape.vision_trained == sum(p.numel() for p in vision if p.requires_grad)
    found = forecast(inputs_of(config_of(internvl, freeze=frozen, zero_stage=0)), utilisation=0.4)
    assert found.configured.parts["optimizer"] == 8 * trained


@pytest.mark.parametrize("frozen", [[], pytest.param(["vision_tower"], marks=pytest.mark.more)])
def test_what_is_kept_and_computed_is_that_of_a_real_pass(internvl: Path, frozen: list[str]) -> None:
    """Tower and language model are traced apart, and the operations of the tower are counted by its weights."""
    inputs = inputs_of(config_of(internvl, freeze=frozen, attention="eager"))
    model, real = tiny_model("internvl"), real_inputs("internvl", 2)
    model.set_attn_implementation("eager")  # whose operations the counter knows
    freeze(model, frozen)
    known = [*model.train().parameters(), *model.buffers(), *real.values()]
    with FlopCounterMode(display=False) as counter, LiveBytes(known) as live:
        hidden = hidden_states(model, real)
        forward = counter.get_total_flops()
        kept = live.restart() + (0 if frozen else real["pixel_values"].nbytes)  # of which its first gradient is made
        hidden.sum().backward()
    assert inputs.student_activations(False).saved == pytest.approx(kept, rel=0.06)
    assert inputs.flops.forward * 2 * LENGTH == pytest.approx(forward, rel=0.15)
    assert inputs.flops.backward * 2 * LENGTH == pytest.approx(counter.get_total_flops() - forward, rel=0.25)
    assert inputs.towers_traced == {"student": True, "teacher": True}
    without = PlanInputs(inputs.config, inputs.models, inputs.hardware)
    assert without.teacher_activations().forward_peak < inputs.teacher_activations().forward_peak


def test_images_count_in_the_object_store_as_a_start_counts_them(internvl: Path) -> None:
    inputs = inputs_of(config_of(internvl))
    found = forecast(inputs, utilisation=0.4)
    assert inputs.images is not None and inputs.images.tokens == len(tiny_media("internvl").layout(*SIZE).ids)
    assert inputs.image_bytes == 2 * PER_ROW * BYTES_PER_PIXEL * SIZE[0] * SIZE[1]
    room = int(found.object_store_bytes) + 1
    sizes = (int(inputs.answer_bytes), inputs.config.given_teacher, 1)
    node = {"Alive": True, "Resources": {"object_store_memory": room}}
    check_object_store(*sizes, [node], image_bytes=int(inputs.image_bytes))
    node["Resources"] = {"object_store_memory": room - 10}
    with pytest.raises(ClusterError, match="and images of"):
        check_object_store(*sizes, [node], image_bytes=int(inputs.image_bytes))
    assert found.as_dict()["images"]["request_bytes"] == inputs.image_bytes
    assert found.rates.read_s > PER_ROW * inputs.images.student.seconds > 0
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(found, console)
    text = " ".join(console.export_text().split())
    assert f"2 of 60x30, {inputs.images.tokens} of its {LENGTH} tokens each" in text and "on the wire" in text


def test_a_tower_that_cannot_be_traced_is_said(tmp_path: Path) -> None:
    found = forecast(inputs_of(config_of(save_tiny("smolvlm", tmp_path / "model"))), utilisation=0.4)
    assert found.inputs.towers_traced == {"student": False, "teacher": False}
    for name in ("student", "teacher"):
        assert any(
            note.startswith(f"the activations of the {name}'s vision tower are NOT counted") for note in found.notes
        )
    assert found.as_dict()["images"]["towers_traced"] == {"student": False, "teacher": False}


def test_images_that_do_not_fit_or_mean_nothing_are_refused(internvl: Path) -> None:
    config = config_of(internvl)
    with pytest.raises(
        ConfigError, match=r"--images-per-row 30: images of 60x30 have \d+ tokens each, more than a row"
    ):
        inputs_of(config, per_row=30)
    assert image_numbers(config, None, None) == (1024, 768) and image_numbers(config, "5x7", 2) == (5, 7)
    for size in ("5", "0x7", "5 x 7", "axb"):
        with pytest.raises(ConfigError, match=r"--image-size: width and height in pixels"):
            image_numbers(config, size, None)
    text = config.model_copy(update={"data": config.data.model_copy(update={"images_column": None})})
    assert image_numbers(text, None, None) and row_images(text, None, None, SIZE, 1) is None
    with pytest.raises(ConfigError, match=r"--images-per-row 2: this run has no images"):
        image_numbers(text, None, 2)
