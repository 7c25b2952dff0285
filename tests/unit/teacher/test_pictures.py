"""A teacher that is shown images: its answers are those of the plain model, and it never answers without having seen them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taid_ray.config.models import TeacherConfig
from taid_ray.config.schema import build_config
from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.errors import ConfigError, DataError, ModelError, TeacherError
from taid_ray.media.processor import MediaProcessor, MediaSettings
from taid_ray.media.refs import ImageRef
from taid_ray.models.loading import check_divisible, load_causal_lm
from taid_ray.teacher.cache.offline import OfflineTeacher, all_records, save_record, write_record
from taid_ray.teacher.local import LocalTeacher
from taid_ray.teacher.model import TeacherModel
from tests.support.architectures.split import SplitTeacher
from tests.support.shown import batch_with_images, noise
from tests.support.tiny_vision import save_tiny, tiny_config, tiny_media

CPU = torch.device("cpu")
SETTINGS = MediaSettings("pil")
SHARED = 500
FAMILIES = ["llava", "idefics3", "qwen2_5_vl"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TeacherConfig]:
    """Configuration of a tiny saved model of a family; made once."""
    root = tmp_path_factory.mktemp("models")

    def config(name: str) -> TeacherConfig:
        if not (root / name).exists():
            save_tiny(name, root / name)
        return TeacherConfig(model=str(root / name), mode="local", dtype="float32")

    return config


def pictures(teacher: TeacherModel, batch: Batch, contents: dict[str, bytes]) -> Any:
    return teacher.pictures(batch.images, lambda image: contents[image.digest])


def hidden(teacher: TeacherModel, batch: Batch, contents: dict[str, bytes]) -> Tensor:
    shown = pictures(teacher, batch, contents)
    return teacher.score(batch.inputs, batch.loss_positions, batch.labels, shown)["hidden"]


def plain(config: TeacherConfig, batch: Batch, media: MediaProcessor, contents: dict[str, bytes]) -> Tensor:
    """Each row alone and whole, straight from transformers."""
    model, found = load_causal_lm(config, images=True), []
    length = batch.inputs["input_ids"].shape[1]
    for number, images in enumerate(batch.images):
        shown = [[media.picture(image, contents[image.digest]) for image in images]]
        inputs = media.inputs(*(batch.inputs[name][[number]] for name in ("input_ids", "position_ids")), shown)
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        found.append(states[batch.loss_positions[batch.loss_positions // length == number] % length])
    return torch.cat(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_with_pictures_are_those_of_the_model_itself(name: str, saved: Callable[[str], TeacherConfig]) -> None:
    config, media = saved(name), tiny_media(name)
    batch, contents = batch_with_images(media)
    together = TeacherModel(config, SHARED, CPU, media=SETTINGS)
    expected, found = plain(config, batch, media, contents), hidden(together, batch, contents)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(found, hidden(together, batch, contents))
    alone = TeacherModel(config.model_copy(update={"max_tokens": 1}), SHARED, CPU, media=SETTINGS)
    torch.testing.assert_close(hidden(alone, batch, contents), expected, atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def llava(saved: Callable[[str], TeacherConfig]) -> TeacherModel:
    return TeacherModel(saved("llava"), SHARED, CPU, media=SETTINGS)


def test_another_picture_changes_its_own_row_only(llava: TeacherModel) -> None:
    batch, contents = batch_with_images(tiny_media("llava"))
    before = hidden(llava, batch, contents)
    first = batch.images[0][0].digest
    after = hidden(llava, batch, contents | {first: noise(40, 30, 99)})
    assert torch.equal(after[3:], before[3:]) and not torch.isclose(after[:3], before[:3]).all(-1).any()


def test_image_tokens_without_their_images_are_refused(llava: TeacherModel) -> None:
    batch, contents = batch_with_images(tiny_media("llava"))
    shown = [list(found) for found in pictures(llava, batch, contents)]
    asked = (batch.inputs, batch.loss_positions, batch.labels)
    with pytest.raises(TeacherError, match="row 0 of a request has 4 image tokens, and its 0 images make 0 features"):
        llava.score(*asked)
    with pytest.raises(TeacherError, match=r"row 2 .* has 8 image tokens, and its 1 images make 4 features"):
        llava.score(*asked, [*shown[:2], shown[2][:1], shown[3]])
    with pytest.raises(TeacherError, match=r"row 1 .* has 0 image tokens, and its 1 images make 4"):
        llava.payload_error(*asked[:2], [shown[0], shown[0], *shown[2:]])
    with pytest.raises(TeacherError, match=r"must hold the images of each \(found 3 rows"):
        llava.score(*asked, shown[:3])
    inside = torch.tensor([shown[0][0].start])
    with pytest.raises(TeacherError, match=r"row 0 .* has its last loss position \(\d+\) inside of an image"):
        llava.score(batch.inputs, inside, batch.labels[:1], shown)


def test_a_broken_picture_is_refused_before_the_model_sees_it(llava: TeacherModel) -> None:
    batch, contents = batch_with_images(tiny_media("llava"))
    broken = contents | {batch.images[0][0].digest: b"no picture"}
    with pytest.raises(DataError):
        pictures(llava, batch, broken)


def test_a_local_teacher_reads_each_image_and_answers_in_any_order(
    saved: Callable[[str], TeacherConfig], llava: TeacherModel
) -> None:
    batch, contents = batch_with_images(tiny_media("llava"))
    text = collate([Row([5, 6, 7], [0, 1, 2], [6, 7, NO_LABEL])])
    asked: list[str] = []

    def read(image: ImageRef) -> bytes:
        asked.append(image.digest)
        if image.digest == "gone":
            raise DataError("the image is missing")
        return contents[image.digest]

    teacher = LocalTeacher(saved("llava"), SHARED, CPU, SETTINGS, read)
    missing = replace(batch, images=((replace(batch.images[0][0], digest="gone"),), *batch.images[1:]))
    requests = [teacher.submit(one) for one in (batch, text, missing, batch)]
    assert not asked, "pixels are made shortly before they are needed"
    first, plain = (teacher.collect(one).tensors["hidden"] for one in requests[:2])
    assert torch.equal(first, hidden(llava, batch, contents)) and plain.shape == (2, 32)
    with pytest.raises(DataError, match="is missing"):
        teacher.collect(requests[2])
    assert torch.equal(teacher.collect(requests[3]).tensors["hidden"], first)
    assert sorted(asked) == sorted([*contents, *contents, "gone"])
    teacher.close()


def test_seeing_is_the_divergence_of_answers_with_and_without(llava: TeacherModel) -> None:
    media = tiny_media("llava")
    batch, contents = batch_with_images(media)
    shown, greys = pictures(llava, batch, contents), llava.pictures(batch.images, media.grey)
    found = llava.seeing(batch.inputs, batch.loss_positions, shown, greys)
    exact = [
        llava.head()
        .logits(llava.score(batch.inputs, batch.loss_positions, batch.labels, these)["hidden"])
        .log_softmax(-1)
        for these in (shown, greys)
    ]
    kl = (exact[0].exp() * (exact[0] - exact[1])).sum(-1)
    expected = [float(kl[:3].mean()), 0.0, float(kl[6:9].mean()), 0.0]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7) and found[0] > 1e-4
    assert llava.seeing(batch.inputs, batch.loss_positions, shown, shown) == [0.0] * 4


def test_the_processor_is_part_of_the_identity_and_pixels_of_the_probe(
    llava: TeacherModel, saved: Callable[[str], TeacherConfig]
) -> None:
    config = saved("llava")
    other = MediaSettings("pil", {"image_mean": [0.4, 0.4, 0.4]})
    info, again, changed = (TeacherModel(config, SHARED, CPU, media=s).info() for s in (SETTINGS, SETTINGS, other))
    assert info == again == llava.info()
    assert changed.fingerprint != info.fingerprint and changed.probe_digest != info.probe_digest
    assert changed.head_digest == info.head_digest


def test_a_record_is_found_for_the_processor_that_it_was_made_with(
    saved: Callable[[str], TeacherConfig], tmp_path: Path
) -> None:
    section = {"model": saved("llava").model, "dtype": "float32", "mode": "cache"}
    config = build_config(
        {
            "teacher": section,
            "student": {"model": saved("llava").model, "dtype": "float32"},
            "data": {"train": "rows.jsonl"},
            "schedule": {"alpha": 1.0, "beta": 0.5},
            "train": {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "learning_rate": 0.1},
            "cache": {"directory": str(tmp_path)},
        }
    )
    teacher = LocalTeacher(saved("llava"), SHARED, CPU, SETTINGS)
    save_record(config, teacher, 0.0, [0.5, 0.25], SETTINGS)
    batch, _ = batch_with_images(tiny_media("llava"))
    assert OfflineTeacher(config, SHARED, media=SETTINGS).seeing(batch, batch) == [0.5, 0.25]
    for other in (None, MediaSettings("pil", {"image_mean": [0.4, 0.4, 0.4]})):
        with pytest.raises(ConfigError, match="holds no outputs"):
            OfflineTeacher(config, SHARED, media=other)
    ((_, record),) = all_records(tmp_path)
    write_record(str(tmp_path / "text"), replace(record, seeing=None))
    assert '"seeing"' not in next((tmp_path / "text").rglob("teacher.json")).read_text()
    assert all_records(tmp_path / "text")[0][1] == replace(record, seeing=None)


def test_a_family_without_a_plan_is_not_split() -> None:
    with pytest.raises(
        ModelError, match=r"teacher\.shards = 2: .* no plan to split a model of type qwen3_vl; set .* 1"
    ):
        check_divisible(tiny_config("qwen3_vl"), 2)
    check_divisible(tiny_config("qwen3_vl"), 1)
    check_divisible(tiny_config("qwen2_5_vl"), 2)


@pytest.mark.more
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_split_teacher_sees_what_a_whole_one_sees(name: str, saved: Callable[[str], TeacherConfig]) -> None:
    config = saved(name)
    batch, contents = batch_with_images(tiny_media(name))
    whole = TeacherModel(config, SHARED, CPU, media=SETTINGS)
    split = SplitTeacher()
    try:
        found = split.hidden(Path(config.model), batch, SETTINGS, contents)
    finally:
        split.close()
    torch.testing.assert_close(found, hidden(whole, batch, contents), atol=2e-5, rtol=1e-4)
