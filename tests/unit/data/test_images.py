"""Rows with images: every shape in which public data have them, what tokens they become, and what is said of bad ones."""

import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from taid_ray.config.data import DataSource
from taid_ray.data.dataset import TrainingData, validation_rows
from taid_ray.data.encoding import Encoder
from taid_ray.data.images import EncoderMedia
from taid_ray.data.packing import Sample
from taid_ray.data.preview import preview
from taid_ray.data.reading.arrow_rows import _batch_rows
from taid_ray.data.reading.hub import HubDocuments
from taid_ray.errors import DataError
from taid_ray.media.reader import ImageReader, digest_of
from tests.support.images import CLOSE, IMAGE_TOKEN, OPEN, TEMPLATE, StubTokens, picture, vision_tokenizer

TOKENIZER = vision_tokenizer()
TOKENS = StubTokens(TOKENIZER)
CAT, DOG = picture((8, 6)), picture((16, 4), "JPEG")
SHAPES = {CAT: "8x6", DOG: "16x4"}
ANSWER = {"role": "assistant", "content": "a cat"}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cat.png").write_bytes(CAT)
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "sub dir" / "dog.jpg").write_bytes(DOG)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("cat.png", CAT)
        archive.writestr("sub dir/dog.jpg", DOG)
    return tmp_path


def encoder_of(folder: Path, tokenizer: Any = TOKENIZER, **settings: Any) -> Encoder:
    given = {"format": "chat", "images_column": "images", "images_directory": str(folder), "sequence_length": 512}
    return Encoder(DataSource(train="x", **given | settings), tokenizer, "data.train: x", EncoderMedia(TOKENS))


def encoded(encoder: Encoder, messages: Any, images: Any = None) -> list[Sample]:
    row = {"messages": messages, "tools": None, "system": None, "images": images}
    return encoder.encode({name: [value] for name, value in row.items()}, 7)


def shown(folder: Path, messages: Any, images: Any = None, **settings: Any) -> str:
    (sample,) = encoded(encoder_of(folder, **settings), messages, images)
    check(sample)
    parts = preview(sample, TOKENIZER).parts
    return "".join(f"⟦{part.text}⟧" if part.has_loss else part.text for part in parts)


def check(sample: Sample) -> None:
    """Images are where they say, with the tokens that the processor gives, never to be predicted; and there are no others."""
    inside: set[int] = set()
    for image in sample.images:
        own = TOKENS.layout(image.width, image.height).ids.tolist()
        assert sample.input_ids[image.start : image.start + image.tokens] == own
        inside |= set(range(image.start, image.start + image.tokens))
    assert not any(sample.loss_mask[at] for at in inside)
    special = set(TOKENIZER.convert_tokens_to_ids([IMAGE_TOKEN, OPEN, CLOSE]))
    assert not any(token in special for at, token in enumerate(sample.input_ids) if at not in inside)


EXPECTED = (
    "<|im_start|>user\n[image 8x6]\nwhat?<|im_end|>\n<|im_start|>assistant\n⟦a cat<|im_end|>\n⟧"
    "<|im_start|>user\nand [image 16x4]?<|im_end|>\n<|im_start|>assistant\n⟦a cat<|im_end|>\n⟧"
)
HF = [
    user([{"type": "image", "text": None}, {"type": "text", "text": "\nwhat?"}]),
    ANSWER,
    user([{"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": "?"}]),
    ANSWER,
]
MARKED = [user("<image>\nwhat?"), ANSWER, user("and <image>?"), ANSWER]
LLAVA = [{"from": "human" if message["role"] == "user" else "gpt", "value": message["content"]} for message in MARKED]
OWN = [
    user([{"type": "image", "image": {"bytes": CAT, "path": None}}, {"type": "text", "text": "\nwhat?"}]),
    ANSWER,
    user([
        {"type": "text", "text": "and "},
        {"type": "image_url", "image_url": {"url": "sub dir/dog.jpg"}},
        {"type": "text", "text": "?"},
    ]),
    ANSWER,
]  # fmt: skip


@pytest.mark.parametrize("archive", ["", "all.zip"])
@pytest.mark.parametrize(
    ("messages", "images"),
    [
        (HF, [{"bytes": CAT, "path": "elsewhere.png"}, {"bytes": None, "path": "sub dir/dog.jpg"}]),
        (HF, [CAT, "sub dir/dog.jpg"]),
        (LLAVA, ["cat.png", "sub dir/dog.jpg"]),
        (json.dumps(LLAVA), '["cat.png", "sub dir/dog.jpg"]'),
        (OWN, None),
    ],
    ids=["hugging face", "bytes and paths", "llava", "json", "in the parts"],
)
def test_shapes_of_rows(folder: Path, messages: Any, images: Any, archive: str) -> None:
    assert shown(folder / archive, messages, images) == EXPECTED


def test_images_without_a_mark_come_first_and_that_is_said(folder: Path) -> None:
    encoder = encoder_of(folder)
    (sample,) = encoded(encoder, [user("what?"), ANSWER], ["cat.png", "sub dir/dog.jpg"])
    check(sample)
    assert preview(sample, TOKENIZER).to_dict()["text"].startswith("<|im_start|>user\n[image 8x6][image 16x4]what?")
    assert preview(sample, TOKENIZER).images == ("cat.png", "sub dir/dog.jpg")
    assert any("images without a mark" in line for line in encoder.description())


def test_an_absolute_path_a_single_image_and_text_without_images(folder: Path) -> None:
    talk = [user("is <image> html? <image>"), ANSWER]
    assert "[image 8x6]" in shown(folder, [user("<image>"), ANSWER], str(folder / "cat.png"), images_directory=None)
    assert "is <image> html? <image>" in shown(folder, talk)
    assert "is <image> html? <image>" in shown(folder, talk, [])
    marked = [user("<image>"), {"role": "assistant", "content": "it has <image> in it"}]
    assert "⟦it has <image> in it<|im_end|>\n⟧" in shown(folder, marked, "cat.png")


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize("messages", [HF, LLAVA, [user("one"), ANSWER, user("two"), ANSWER]])
def test_loss_never_lies_on_an_image(folder: Path, messages: Any, loss_on: str, turns: str) -> None:
    if (loss_on, turns) == ("all", "last"):
        return
    samples = encoded(encoder_of(folder, loss_on=loss_on, turns=turns), messages, ["cat.png", "sub dir/dog.jpg"])
    for sample in samples:
        check(sample)
        assert any(sample.loss_mask)


def test_ids_are_those_of_the_text_with_all_tokens_written_out(folder: Path) -> None:
    (sample,) = encoded(encoder_of(folder), LLAVA, ["cat.png", "sub dir/dog.jpg"])
    text = EXPECTED.replace("⟦", "").replace("⟧", "")
    for size, count in (("8x6", 3), ("16x4", 4)):
        text = text.replace(f"[image {size}]", OPEN + IMAGE_TOKEN * count + CLOSE)
    assert sample.input_ids == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_long_row_is_cut_before_an_image(folder: Path) -> None:
    (whole,) = encoded(encoder_of(folder), LLAVA, ["cat.png", "sub dir/dog.jpg"])
    first, second = whole.images
    for length in range(second.start - 1, second.start + second.tokens + 2):
        encoder = encoder_of(folder, sequence_length=length, overlong="truncate")
        (short,) = encoded(encoder, LLAVA, ["cat.png", "sub dir/dog.jpg"])
        whole_image = length >= second.start + second.tokens
        assert len(short.input_ids) == (length if whole_image else min(length, second.start))
        assert short.images == ((first, second) if whole_image else (first,))
        check(short)
    encoder = encoder_of(folder, sequence_length=first.start + 1, overlong="truncate")
    assert encoded(encoder, LLAVA, ["cat.png", "sub dir/dog.jpg"]) == [] and encoder.counts.dropped == 1
    with pytest.raises(
        DataError, match=r"row 7 has \d+ tokens, 11 of them of 2 image\(s\), more than data\.sequence_length = 50"
    ):
        encoded(encoder_of(folder, sequence_length=50), LLAVA, ["cat.png", "sub dir/dog.jpg"])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("none.png", r"image 2 \(none\.png\) is missing\."),
        ("sub dir", r"image 2 \(sub dir\) is a directory"),
        ({"bytes": None, "path": None}, "image 2 is missing"),
        (b"", "image 2 is no picture"),
        ({"bytes": b"GIF no", "path": "x.gif"}, r"image 2 \(x\.gif\) is no picture"),
        ("https://host/cat.png", r"image 2 \(https://host/cat\.png\) is an address; images are not downloaded"),
        ("data:image/png;base64,AAAA", "is an address"),
        (3, "image 2 is no image but of the type int"),
        ("half \ud800", "cannot be the name of a file"),
        (picture(mode="I;16"), "image 2 is of mode I;16"),
        (picture((90, 90)), "image 2 has 8,100 pixels, more than data.max_image_pixels = 8,000"),
        (picture((1001, 1)), "image 2 does not suit the model: an image of 1001x1 pixels cannot be used"),
    ],
)
def test_an_image_that_cannot_be_used(folder: Path, image: Any, reason: str) -> None:
    row = LLAVA, ["cat.png", image]
    with pytest.raises(DataError, match=rf"^data\.train: x: row 7.*{reason}.* data\.bad_images: drop"):
        encoded(encoder_of(folder, max_image_pixels=8000), *row)
    dropping = encoder_of(folder, max_image_pixels=8000, bad_images="drop")
    assert encoded(dropping, *row) == [] and len(encoded(dropping, LLAVA, ["cat.png", "cat.png"])) == 1
    assert dropping.counts.to_dict() == {
        "documents": 2, "dropped": 1, "truncated": 0, "empty_answers": 0, "images": 2, "bad_images": 1
    }  # fmt: skip
    assert "1 row(s) were left out for an image (data.bad_images: drop), for example:" in dropping.notes()[0]


def test_damaged_pixels_are_found_before_rows_are_dropped(folder: Path) -> None:
    damaged = picture((300, 300))[:-80]
    (sample,) = encoded(
        encoder_of(folder, sequence_length=8000), [user("<image>"), ANSWER], [damaged]
    )  # as far as its header says
    assert sample.images[0].width == 300
    assert encoded(encoder_of(folder, bad_images="drop"), [user("<image>"), ANSWER], [damaged]) == []


@pytest.mark.parametrize(
    ("messages", "images", "reason"),
    [
        (MARKED, ["cat.png"], r"row 7 has 1 image\(s\) and 2 mark\(s\)"),
        (MARKED, ["cat.png"] * 3, r"has 3 image\(s\) and 2 mark\(s\)"),
        (HF, None, r"has 0 image\(s\) and 2 mark\(s\)"),
        ([{"role": "system", "content": "x"}, ANSWER], ["cat.png"], r"has 1 image\(s\) and 0 mark\(s\)"),
        ([user("a \ufdd0 b"), ANSWER], None, "which no text has"),
        ([user(f"a {IMAGE_TOKEN} b"), ANSWER], None, "which the model takes for an image"),
    ],
)
def test_marks_that_do_not_fit(folder: Path, messages: Any, images: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        encoded(encoder_of(folder, bad_images="drop"), messages, images)


def test_templates(folder: Path) -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(DataError, match=r"data\.chat_template: does not write '<\|image\|>' for an image"):
        encoder_of(folder, chat_template=plain)
    lossy = TEMPLATE.replace(
        "part.type == 'image'", "part.type == 'image' and not loop.index0"
    )  # only where it comes first
    with pytest.raises(DataError, match="the chat template shows 1 of 2 images"):
        encoded(encoder_of(folder, chat_template=lossy), LLAVA, ["cat.png", "sub dir/dog.jpg"])
    both = TEMPLATE.replace(
        "{% for part in m.content %}",
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}",
    )
    both = both.replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>")
    assistant = both.replace("m.content is string", "m.role == 'assistant'")  # shows its content as it is
    for template in (both, assistant):
        assert shown(folder, LLAVA, ["cat.png", "sub dir/dog.jpg"], chat_template=template) == EXPECTED


def test_templates_that_look_at_the_first_part_or_show_images_first(folder: Path) -> None:
    """As those of SmolVLM, which asks for the type of the first part, and of LLaVA 1.5, whose turns no token ends."""
    smol = (
        "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<|image|>{% endif %}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    assert shown(folder, MARKED, ["cat.png", "sub dir/dog.jpg"], chat_template=smol) == (
        "<|im_start|>User:[image 8x6]\nwhat?<|im_end|>\nAssistant:⟦ a cat<|im_end|>\n⟧"
        "User: and [image 16x4]?<|im_end|>\nAssistant:⟦ a cat<|im_end|>\n⟧"
    )
    assert "Assistant:⟦ <|im_end|>" in shown(
        folder, [user("?"), {"role": "assistant", "content": ""}], chat_template=smol
    )
    llava = (
        "{% for m in messages %}{{ m.role.upper() }}: {% for part in m.content | selectattr('type', 'equalto', 'image') %}"
        "<|image|>\n{% endfor %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ part.text + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    assert shown(folder, MARKED, ["cat.png", "sub dir/dog.jpg"], chat_template=llava) == (
        "USER: [image 8x6]\n\nwhat? ASSISTANT:⟦ a cat ⟧USER: [image 16x4]\nand  ? ASSISTANT:⟦ a cat ⟧"
    )


def test_keys_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.images_column needs format: chat \(found format: text\)"):
        DataSource(train="x", images_column="images")
    with pytest.raises(
        ValueError, match=r"data\.images_column needs data\.order: global \(found data\.order: blocks\)"
    ):
        DataSource(train="x", format="chat", images_column="images", order="blocks")
    with pytest.raises(DataError, match=r"data\.images_directory: .* is no folder"):
        encoder_of(folder / "cat.png")
    with pytest.raises(
        DataError, match=r"data\.images_directory: missing, and the data have images with relative paths \(cat\.png\)"
    ):
        encoded(encoder_of(folder, images_directory=None, bad_images="drop"), LLAVA, ["cat.png", "cat.png"])


def test_validation_rows_have_images_that_can_be_read(folder: Path) -> None:
    rows = [
        {"conversation": MARKED, "image": ["cat.png", "sub dir/dog.jpg"]},
        {"conversation": [user("hi"), ANSWER]},
    ] * 3
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"format": "chat", "images_column": "images", "images_directory": str(folder), "valid_documents": 3}
    config = DataSource(train=str(folder / "d.jsonl"), sequence_length=256, **given)
    memory: dict[str, bytes] = {}

    def keep(digest: str, content: bytes) -> str:
        memory[digest] = content
        return "memory:"

    media = EncoderMedia(TOKENS, keep)
    found = validation_rows(config, TOKENIZER, media=media)
    images = [image for row in found for image in row.images]
    assert [ImageReader(memory).read(image) for image in images] == [CAT, DOG] * 2 and not memory
    for row in found:
        for image in row.images:
            assert (
                row.input_ids[image.start] == TOKENS.open
                and row.input_ids[image.start + image.tokens - 1] == TOKENS.close
            )
    assert [len(sample.images) for sample in TrainingData(config, TOKENIZER, 0, 1, media).samples()] == [0, 2, 0]
    assert digest_of(CAT) == images[0].digest


def dataset_with_images(folder: Path) -> Any:
    """A data set as of the hub, with an Image feature: one image by its bytes, one by its path."""
    features = datasets.Features({
        "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "images": datasets.Sequence(datasets.Image()),
    })  # fmt: skip
    images = [{"bytes": CAT, "path": None}, {"bytes": None, "path": str(folder / "sub dir" / "dog.jpg")}]
    return datasets.Dataset.from_dict({"messages": [MARKED] * 3, "images": [images] * 3}, features=features)


def test_image_features_of_the_hub_stay_undecoded(folder: Path) -> None:
    broken = dataset_with_images(folder).add_item(
        {"messages": MARKED, "images": [{"bytes": b"broken", "path": None}] * 2}
    )
    config = DataSource(train="hub/name", format="chat", images_column="images")
    documents = HubDocuments(broken, "data.train: hub/name", config)
    (first, good), (last, bad) = documents.blocks(1, 2)
    samples = encoder_of(folder).encode(good, first)
    assert (first, last) == (2, 4) and [len(sample.images) for sample in samples] == [2, 2]
    with pytest.raises(DataError, match="row 4: image 1 is no picture"):
        encoder_of(folder).encode(bad, last)
    assert documents.fingerprint() == documents.fingerprint()


def test_saved_image_features_are_read_in_small_parts(folder: Path, tmp_path: Path) -> None:
    found = dataset_with_images(folder)
    found.save_to_disk(tmp_path / "saved")
    found.to_parquet(tmp_path / "d.parquet")
    for path in (tmp_path / "saved", tmp_path / "d.parquet"):
        config = DataSource(
            train=str(path), format="chat", images_column="images", valid_documents=3, sequence_length=256
        )
        rows = validation_rows(config, TOKENIZER, media=EncoderMedia(TOKENS))
        assert [image.digest for row in rows for image in row.images] == [digest_of(CAT), digest_of(DOG)] * 3
    schema = pq.read_schema(tmp_path / "d.parquet")
    assert (_batch_rows(schema, ["images"]), _batch_rows(schema, ["messages"])) == (16, 1024)
