import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from taid_ray.errors import DataError, ModelError
from taid_ray.media import processor as processor_module
from taid_ray.media.families import FAMILIES
from taid_ray.media.opening import open_image
from taid_ray.media.pictures import Pictures, pictures_of
from taid_ray.media.processor import MediaSettings, drawn, load_media_processor
from taid_ray.media.refs import ImageRef
from tests.support.tiny_vision import content_of, image_ref, row_ids, save_tiny, tiny_media, tiny_processor

SIZES = ((30, 40), (90, 33), (20, 121))
SQUARE = (28, 28)


def batch_of(media: Any, *rows: tuple[str | tuple[int, int], ...]) -> tuple[dict[str, torch.Tensor], Any]:
    """Rows, padded on the right with ids 0, and their images; see `row_ids`."""
    made = [row_ids(media, *parts) for parts in rows]
    length = max(len(ids) for ids, _ in made)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in made])
    positions = torch.arange(length).expand(len(made), -1).clone()
    return {"input_ids": ids, "position_ids": positions}, tuple(tuple(images) for _, images in made)


def test_every_family_has_a_tiny_model() -> None:
    assert {name: tiny_media(name).family for name in FAMILIES} == FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_of_a_batch_are_the_processor_s_own(name: str) -> None:
    """Ids, and the images joined, of rows with three, one and no images equal what transformers makes of texts and images."""
    media = tiny_media(name)
    rows = (("Once", SIZES[0], SIZES[1], " and", SIZES[2]), (SIZES[1], "he said"), ("Tom was sad.",))
    inputs, images = batch_of(media, *rows)
    found = media.inputs(**inputs, pictures=pictures_of(media, images, content_of))

    mark = media.processor.image_token
    texts = ["".join(part if isinstance(part, str) else mark for part in row) for row in rows]
    pixels = [[open_image(content_of(ref), ref.width, ref.height, "") for ref in row] for row in images]
    for number in range(len(rows)):
        some = {"images": [pixels[number]]} if pixels[number] else {}
        own = media.processor(text=[texts[number]], return_tensors="pt", add_special_tokens=False, **some)
        length = own["input_ids"].shape[1]
        assert torch.equal(found["input_ids"][number, :length], own["input_ids"][0])
    seeing = {"text": texts[:2], "images": pixels[:2], "padding": True, "padding_side": "right"}
    whole = media.processor(return_tensors="pt", add_special_tokens=False, **seeing)
    for key in media.family.inputs:
        blind = found[key][2:] if media.family.join == "rows" else found[key][:0]
        assert torch.equal(found[key][: len(whole[key])], whole[key]) and not blind.any()
    assert set(found) == {"input_ids", "position_ids", *media.family.inputs}
    text_only, no_images = batch_of(media, rows[2])
    assert set(media.inputs(**text_only, pictures=no_images)) == {"input_ids", "position_ids"}


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_from_sizes_alone_are_those_of_pixels(name: str, backend: str) -> None:
    """`picture` compares what the processor made with the layout, for sizes at which rounding decides, and odd ones."""
    media = tiny_media(name, backend)
    sides = (1, 13, 28, 57, 85, 113, 399)
    for width, height in [(a, b) for a in sides for b in sides]:
        content = drawn(width, height)
        try:
            ref = image_ref(media, 0, width, height)
        except DataError as error:
            assert "long and narrow" in str(error) or "aspect ratio" in str(error)
            assert max(width, height) / min(width, height) > 14
            continue
        picture = media.picture(ref, content)
        assert (picture.tokens, picture.features) == (ref.tokens, media.layout(width, height).features)


def test_rows_without_their_images_are_refused() -> None:
    media = tiny_media("llava")
    inputs, images = batch_of(media, ("a", SQUARE, "b"), ("c", SQUARE))
    pictures = pictures_of(media, images, content_of)
    for wrong in ((), (pictures[0], ()), (pictures[0] * 2, pictures[1])):
        with pytest.raises(DataError, match=r"row \d of a batch has 4 image tokens, and its images make \d features"):
            media.inputs(**inputs, pictures=wrong)


def test_a_broken_or_changed_image_is_named() -> None:
    media = tiny_media("llava")
    ref = image_ref(media, 0, 40, 30)
    content = content_of(ref)
    ref = replace(ref, place="file:cats/3.png")
    for damaged in (b"", b"GIF89a", content[: len(content) // 2]):
        with pytest.raises(DataError, match=r"the image file:cats/3.png cannot be read \("):
            media.picture(ref, damaged)
    with pytest.raises(DataError, match=r"file:cats/3.png has 41x30 pixels, and had 40x30 when"):
        media.picture(ref, drawn(41, 30))


def test_images_are_upright_and_in_colour() -> None:
    """An image turned by its EXIF data is processed as it is seen; grey and transparent ones become RGB."""
    upright = Image.open(io.BytesIO(drawn(40, 30)))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert open_image(buffer.getvalue(), 40, 30, "").tobytes() == upright.tobytes()
    for mode in ("1", "L", "LA", "P", "PA", "RGBA", "CMYK"):
        buffer = io.BytesIO()
        upright.convert(mode).save(buffer, "TIFF" if mode in ("PA", "CMYK") else "PNG")
        assert open_image(buffer.getvalue(), 40, 30, "").mode == "RGB"


def test_grey_images_and_the_blank_row() -> None:
    media = tiny_media("idefics3")
    ref = image_ref(media, 3, 31, 17)
    grey = open_image(media.grey(ref), 31, 17, "")
    assert grey.getcolors() == [(31 * 17, (128, 128, 128))]
    ids, blank, content = media.blank_row()
    picture = media.picture(blank, content)
    assert (blank.start, blank.tokens, len(ids)) == (0, len(ids), picture.tokens)
    assert picture.tensors["pixel_values"].any(), "padding is what it would be taken for"


def test_a_saved_processor_is_loaded_as_it_was(tmp_path: Path) -> None:
    path = save_tiny("llava", tmp_path / "model")
    loaded = load_media_processor(str(path), MediaSettings("pil"), "student.model")
    assert loaded.identity() == tiny_media("llava").identity()
    other = load_media_processor(str(path), MediaSettings("pil", {"image_mean": [0.0] * 3}), "student.model")
    assert other.identity() != loaded.identity()
    ref = image_ref(loaded, 0, *SQUARE)
    one, two = (media.picture(ref, content_of(ref)).tensors["pixel_values"] for media in (loaded, other))
    assert not torch.equal(one, two)


def test_settings_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path = str(save_tiny("llava", tmp_path / "model"))
    unusable = r"teacher.model = .*: its processor cannot be used; save .*, or correct data.image_processor"
    unknown = r"data.image_processor: CLIPImageProcessorPil of teacher.model has no setting 'max_patches' \(it has: "
    for options, message in (
        ({"max_patches": 3}, unknown),
        ({"size": "large"}, unusable),
        ({"do_center_crop": False, "size": {"shortest_edge": 28}}, unusable),
    ):
        with pytest.raises(ModelError, match=message):
            load_media_processor(path, MediaSettings("pil", options), "teacher.model")


def test_models_that_see_in_other_ways_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(ModelError, match=r"teacher.model: taid-ray cannot feed images to a model of type paligemma"):
        load_media_processor(str(tmp_path), MediaSettings("pil"), "teacher.model")


def test_a_missing_torchvision_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(save_tiny("llava", tmp_path / "model"))
    monkeypatch.setattr(processor_module, "torchvision_problem", lambda: "No module named 'torchvision'")
    load_media_processor(path, MediaSettings("pil"), "student.model")  # this family can do without
    with pytest.raises(
        ModelError, match=r"student.model: .* llava needs the package torchvision, which .*taid-ray\[vision\]"
    ):
        load_media_processor(path, MediaSettings("torchvision"), "student.model")


def test_a_processor_that_would_be_fed_wrongly_is_refused(tmp_path: Path) -> None:
    """Loading compares tokens and pixels with the processor's own; here its class has another rule than its family."""
    path = save_tiny("llava", tmp_path / "model")
    family = replace(
        FAMILIES["llava"], measure=lambda images, height, width: {"pixel_values": [torch.zeros(3, 56, 56)]}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llava", family)
        with pytest.raises(ModelError, match=r"student.model = .*features, and"):
            load_media_processor(str(path), MediaSettings("pil"), "student.model")


def test_pictures_are_made_ahead_and_once_each() -> None:
    media = tiny_media("llava")
    inputs, images = batch_of(media, ("a", SQUARE, "b", SQUARE), ("c", SQUARE))
    read: list[ImageRef] = []

    def content(ref: ImageRef) -> bytes:
        read.append(ref)
        return content_of(ref)

    pictures = Pictures(media, content)
    plain = media.inputs(**inputs, pictures=pictures_of(media, images, content_of))
    pictures.prepare(images)
    pictures.prepare(images)
    for _ in range(2):  # prepared, then not
        found = pictures.inputs(inputs, images)
        assert all(torch.equal(found[name], plain[name]) for name in plain) and set(found) == set(plain)
    pictures.close()
    assert len(read) == 2, "equal images of a batch are read once"


def test_the_error_of_an_image_made_ahead_reaches_who_asks() -> None:
    media = tiny_media("llava")
    inputs, images = batch_of(media, ("a", SQUARE))
    pictures = Pictures(media, lambda ref: b"rubbish")
    pictures.prepare(images)
    with pytest.raises(DataError, match="cannot be read"):
        pictures.inputs(inputs, images)
    pictures.close()


def test_tiny_processors_are_whole() -> None:
    """The helper's processors know their image token as the real ones do."""
    for name in FAMILIES:
        processor = tiny_processor(name)
        assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == processor.image_token_id
