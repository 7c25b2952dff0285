"""Vision-language students: made anew, cut out of their teacher, saved, and reloaded with their processor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from taid_ray.config.models import StudentConfig
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.errors import ConfigError
from taid_ray.media.processor import MediaSettings, load_media_processor
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.pair import check_models, model_configs
from taid_ray.models.saving import save_model, saved_tensors
from taid_ray.models.student_init import build_student, student_model_config
from tests.support.tiny_vision import content_of, image_ref, save_tiny, tiny_processor


def config_of(teacher: Path, student: dict[str, Any]) -> DistillConfig:
    data = {"train": "rows.jsonl", "format": "chat", "images_column": "images", "sequence_length": 64}
    sections = {"teacher": {"model": str(teacher), "mode": "local"}, "student": {"dtype": "float32"} | student}
    return build_config(sections | {"data": data, "train": {"steps": 2}})


def checked(config: DistillConfig) -> Any:
    """Makes the checks that come before a run, then the student."""
    check_models(config, *model_configs(config))
    return build_student(config, None)


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl"])
def test_a_student_cut_out_of_its_teacher_keeps_the_tower(name: str, tmp_path: Path) -> None:
    path = save_tiny(name, tmp_path / "teacher", num_hidden_layers=3)
    teacher = load_causal_lm(StudentConfig(model=str(path)), dtype="float32", images=True).state_dict()
    student = checked(config_of(path, {"init": "cut", "layers": [0, 2]})).state_dict()
    kept = {key: key.replace("layers.1.", "layers.2.") if "language_model" in key else key for key in student}
    assert len(student) < len(teacher) and any("vis" in key for key in student)
    assert all(torch.equal(student[key], teacher[old]) for key, old in kept.items())


def test_layers_that_take_features_of_the_tower_cannot_be_cut_away(tmp_path: Path) -> None:
    path = save_tiny("qwen3_vl", tmp_path / "teacher")
    config = config_of(path, {"init": "cut", "layers": [0]})
    student_model_config(config)  # one layer takes features of the tiny tower
    tree = json.loads((path / "config.json").read_text())
    tree["vision_config"]["deepstack_visual_indexes"] = [0, 1]
    (path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(
        ConfigError, match=r"student.layers: Qwen3VLConfig adds .* first 2 layers \(found \[0\]\); keep at"
    ):
        student_model_config(config)


def test_a_new_architecture_changes_values_of_its_parts(tmp_path: Path) -> None:
    path = save_tiny("llava", tmp_path / "teacher")
    change = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"intermediate_size": 20}}
    student = checked(config_of(path, {"init": "scratch", "architecture": change}))
    assert len(student.get_decoder().layers) == 1 and student.config.text_config.hidden_size == 32
    assert student.model.vision_tower.encoder.layers[0].mlp.fc1.weight.shape == (20, 16)
    config = config_of(path, {"init": "scratch", "architecture": {"text_config": {"depth": 1}}})
    with pytest.raises(
        ConfigError, match=r"student.architecture.text_config.depth: LlamaConfig has no such field \(found 1\)"
    ):
        student_model_config(config)


@pytest.mark.parametrize(("name", "settings"), [("qwen2_5_vl", {}), ("idefics3", {"lora": {"rank": 2}})])
def test_a_student_is_reloaded_as_it_was_trained(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """By the classes that its users would take, with its processor; adapters are merged."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from taid_ray.models.adapters import add_lora

    path = save_tiny(name, tmp_path / "student")
    config = config_of(path, {"model": str(path), **settings})
    model = checked(config)
    trained = add_lora(model, config.student.lora, 0) if config.student.lora else model
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    state = {key: tensor.detach().clone() for key, tensor in saved_tensors(trained).items()}
    save_model(config, model, state, tmp_path / "saved")
    tiny_processor(name).save_pretrained(tmp_path / "saved")

    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    media = load_media_processor(str(tmp_path / "saved"), MediaSettings("pil"), "student.model")
    ref = image_ref(media, 0, 40, 30)
    picture = media.picture(ref, content_of(ref))
    ids = torch.from_numpy(media.layout(40, 30).ids.copy())[None]
    inputs = media.inputs(ids, torch.arange(ids.shape[1])[None], [[picture]])
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, trained.eval()(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert type(processor) is type(media.processor)
