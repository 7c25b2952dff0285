"""Vision-language models of every family, loaded, taken apart and tested as others are; what of them is trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from taid_ray.config.models import LoraConfig, StudentConfig, TeacherConfig
from taid_ray.errors import ConfigError, ModelError
from taid_ray.media.families import FAMILIES
from taid_ray.media.pictures import pictures_of
from taid_ray.media.processor import MediaProcessor, MediaSettings
from taid_ray.models import head as head_module
from taid_ray.models import self_test
from taid_ray.models.adapters import add_lora, idle_adapters
from taid_ray.models.freezing import freeze, freeze_unreached
from taid_ray.models.head import hidden_states
from taid_ray.models.image_isolation import check_images
from taid_ray.models.isolation import check_packing
from taid_ray.models.loading import check_attention, check_causal_lm, load_causal_lm
from taid_ray.models.probes import probe_of
from taid_ray.models.processors import compare_sides
from tests.support.tiny_vision import (
    content_of,
    row_ids,
    save_tiny,
    tiny_config,
    tiny_media,
    tiny_model,
    tiny_processor,
)


def seen(model: Any, media: MediaProcessor) -> torch.Tensor:
    """Hidden states of a row of two images and some words, with their graph."""
    ids, images = row_ids(media, "He saw", (30, 30), "and", (60, 40), "far away.")
    pictures = pictures_of(media, (tuple(images),), content_of)
    return hidden_states(model, media.inputs(torch.tensor([ids]), torch.arange(len(ids))[None], pictures))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_the_tests_of_a_model(name: str) -> None:
    """Logits from hidden states and head, and isolation of text and of images; packed, where the family's table says so."""
    model, media = tiny_model(name), tiny_media(name)
    head = self_test.tested_head(model, "student.model", packed=media.family.packs)
    check_images(probe_of(model, head, "student"), media, packed=media.family.packs)


def test_a_family_that_does_not_pack_is_found_out() -> None:
    """What the table says of LFM2-VL is true: its convolutions run on from one document into the next."""
    model, media = tiny_model("lfm2_vl"), tiny_media("lfm2_vl")
    probe = probe_of(model, head_module.head_of(model), "student")
    with pytest.raises(ModelError, match=r"set data.pack: false"):
        check_images(probe, media, packed=True)
    with pytest.raises(ModelError, match=r"set data.pack: false"):
        check_packing(probe)


def test_positions_of_two_dimensions_never_reach_a_model_that_has_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be taken without a word, and packed documents would see each other: the tests notice that, too."""
    model = tiny_model("qwen2_5_vl")
    head = head_module.head_of(model)
    check_packing(probe_of(model, head, "student"))
    monkeypatch.setattr(head_module, "model_inputs", lambda model, inputs: dict(inputs))
    with pytest.raises(ModelError, match=r"set data.pack: false"):
        check_packing(probe_of(model, head, "student"))


def test_models_that_are_blind_or_see_their_neighbours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, media = tiny_model("llava"), tiny_media("llava")
    probe = probe_of(model, head_module.head_of(model), "teacher")
    plain = model.model.get_image_features
    shuffled = {"flip": lambda features: torch.flip(features, [0]), "zero": lambda features: features * 0}
    for way, message in (("flip", "see the image of another one"), ("zero", "does not look at its images")):

        def features(*arguments: Any, way: str = way, **options: Any) -> Any:
            found = plain(*arguments, **options)
            found.pooler_output = [*shuffled[way](torch.stack(list(found.pooler_output)))]
            return found

        monkeypatch.setattr(model.model, "get_image_features", features)
        with pytest.raises(ModelError, match=message):
            check_images(probe, media, packed=False)


def test_a_model_is_loaded_with_its_tower_or_not_at_all(tmp_path: Path) -> None:
    path = save_tiny("internvl", tmp_path / "model")
    model, plain = load_causal_lm(TeacherConfig(model=str(path)), images=True), tiny_model("internvl")
    assert torch.equal(seen(model, tiny_media("internvl")), seen(plain, tiny_media("internvl")))
    with pytest.raises(ModelError, match=r"not a causal language model that"):
        load_causal_lm(TeacherConfig(model=str(path)))

    weights = load_file(path / "model.safetensors")
    blind = {key: tensor for key, tensor in weights.items() if "vision_tower" not in key}
    assert 0 < len(blind) < len(weights)
    save_file(blind, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"teacher.model = .*: the checkpoint has no weights that fit \d+ parameters of InternVL"
    ):
        load_causal_lm(TeacherConfig(model=str(path)), images=True)


def test_configs_are_checked_for_what_they_will_be_shown() -> None:
    config = tiny_config("llava")
    check_causal_lm(config, "student.model", images=True)
    check_attention(StudentConfig(model="x", attention="sdpa"), config, images=True)
    with pytest.raises(ModelError, match=r"student.model: a model of type llava is not a causal language model"):
        check_causal_lm(config, "student.model")
    with pytest.raises(ModelError, match=r"student.model: taid-ray cannot feed images to a model of type llama "):
        check_causal_lm(config.text_config, "student.model", images=True)


def test_frozen_parts_have_no_gradient_and_no_dropout() -> None:
    model, media = tiny_model("llava"), tiny_media("llava")
    freeze(model, ["vision_tower", "model.multi_modal_projector"])
    model.train()
    seen(model, media).sum().backward()
    for name, parameter in model.named_parameters():
        outside = "vision_tower" in name or "projector" in name
        assert parameter.requires_grad is not outside
        assert (parameter.grad is None) == (outside or "lm_head" in name)
    assert model.training and not any(module.training for module in model.model.vision_tower.modules())


def test_names_of_frozen_parts_are_checked() -> None:
    with pytest.raises(
        ConfigError, match=r"student.freeze: LlavaFor\w+ has no module 'vison_tower' \(it has: .*vision_tower"
    ):
        freeze(tiny_model("llava"), ["vison_tower"])
    with pytest.raises(
        ConfigError, match=r"student.freeze: \['model', 'lm_head'\] leaves nothing of LlavaFor\w+ to train"
    ):
        freeze(tiny_model("llava"), ["model", "lm_head"])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_an_image_never_goes_through_is_not_trained(name: str) -> None:
    """Exactly the parameters without a gradient are found: of LLaVA the vision tower's last layer, among others."""
    model, media = tiny_model(name), tiny_media(name)
    names = freeze_unreached(model, seen(model, media))
    seen(model, media).square().sum().backward()
    head = model.get_output_embeddings().weight
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None and p is not head]
    assert without == []
    assert not any("language_model" in key or "text_model" in key for key in names)
    if name == "llava":
        assert any("vision" in key and ".layers.1." in key for key in names)


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "smolvlm"])
def test_adapters_are_on_the_language_model_only(name: str) -> None:
    model = tiny_model(name)
    add_lora(model, LoraConfig(rank=2), 0)
    adapted = [key for key, module in model.named_modules() if hasattr(module, "lora_A")]
    decoder = {id(module) for module in model.get_decoder().modules()}
    assert len(adapted) == 14, adapted
    assert all(id(model.get_submodule(key)) in decoder for key in adapted)
    assert idle_adapters(model) == []
    (somewhere,) = [
        key for key, _ in tiny_model("internvl").named_modules() if key.endswith("vision_tower.encoder.layer.0")
    ]
    with pytest.raises(ConfigError, match=r"student.lora.target_modules: \w+ takes no adapters there"):
        add_lora(tiny_model("internvl"), LoraConfig(target_modules=[f"{somewhere}.mlp.fc1"]), 0)


def other_media(name: str, tokens: int = 1, **options: Any) -> MediaProcessor:
    """A tiny MediaProcessor whose tiles have other numbers of tokens, or whose image processor has other values."""
    processor = tiny_processor(name)
    processor.image_seq_length = tokens
    for key, value in options.items():
        setattr(processor.image_processor, key, value)
    return MediaProcessor(processor, FAMILIES[name], MediaSettings("pil"))


def pairs() -> Iterator[tuple[MediaProcessor, str]]:
    """Processors that do not make the tokens of the tiny InternVL's, and what is said."""
    expected = r"teacher and student make other tokens of an image of "
    yield (
        other_media("internvl", max_patches=1),
        expected + r"\d+x\d+ \(7 and 3, first different at 2\); set data.image_pro",
    )
    yield other_media("internvl", tokens=2), expected + r"28x28 \(3 and 4, first different at 2\)"
    yield other_media("llava"), expected + "28x28"


def test_teacher_and_student_must_make_the_same_tokens_of_images() -> None:
    teacher = tiny_media("internvl")
    assert compare_sides(tiny_media("internvl"), teacher) == []
    for student, message in pairs():
        student.image_token_id = teacher.image_token_id
        with pytest.raises(ModelError, match=message):
            compare_sides(student, teacher)
    other = other_media("internvl")
    other.image_token_id += 1
    with pytest.raises(
        ModelError, match=r"different tokens for images \(ids 512 and 513\); choose a student of the teacher's"
    ):
        compare_sides(other, teacher)


def test_other_pixels_are_said() -> None:
    (note,) = compare_sides(other_media("internvl", image_mean=[0.5, 0.5, 0.5]), tiny_media("internvl"))
    assert note.startswith("teacher and student process images of 28x28, 640x480, ") and note.endswith(
        "gets its own pixels"
    )


def test_the_self_test_looks_at_the_whole_model() -> None:
    """A head that is not the one in use is found for a vision-language model as for others."""
    model = tiny_model("smolvlm")
    head = head_module.head_of(model)
    other = head_module.Head(head.weight + 0.1 * torch.randn_like(head.weight), head.bias, head.transform)
    with pytest.raises(ModelError, match="differ from its own"):
        self_test.self_test(model, other, "student")
