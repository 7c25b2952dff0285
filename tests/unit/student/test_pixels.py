"""The student in its engine with images, one process: it follows a plain loop that calls transformers' processors and models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.data.packing import Sample, to_rows
from taid_ray.distributed.world import World
from taid_ray.media.opening import open_image
from taid_ray.media.refs import ImageRef
from taid_ray.models.precision import floating_tensors
from taid_ray.student.decay import decay_groups
from tests.support.students import SMALL_BUCKETS
from tests.support.tiny_vision import content_of, row_ids, tiny_config, tiny_media, tiny_model

pytestmark = pytest.mark.usefixtures("one_process_group")

DOCUMENTS: list[tuple[str | tuple[int, int], ...]] = [
    ("Tom saw", (30, 40), "a big dog."), ("She ran home.",), ((60, 30), "one", (28, 28), "two", (50, 90), "three."),
    ("It was fun!",), ((30, 30), "red"), ("no",),
]  # fmt: skip
"""Documents of three, one and no images."""
RATE, STEPS = 1e-2, 3
EPSILON = 1e-4
"""AdamW would make much of the noise in gradients that are zero in theory, such as those of the biases of keys."""


def config_of(name: str, zero_stage: int, **student: Any) -> DistillConfig:
    """A configuration of fine-tuning on labels, which needs no teacher."""
    return build_config(
        {
            "teacher": None,
            "student": {"model": name, "dtype": "float32", "zero_stage": zero_stage, "deepspeed": SMALL_BUCKETS}
            | student,
            "data": {"train": "rows.jsonl", "format": "chat", "images_column": "images", "sequence_length": 64},
            "loss": {"name": "sft"},
            "train": {
                "steps": STEPS,
                "batch_size": 4,
                "learning_rate": RATE,
                "weight_decay": 0.1,
                "max_grad_norm": 0.5,
                "epsilon": EPSILON,
            },
        }
    )


def samples(name: str) -> list[Sample]:
    """The documents as samples whose texts carry loss."""
    media, made = tiny_media(name), []
    for number, parts in enumerate(DOCUMENTS):
        ids, images = row_ids(media, *parts)
        mask = np.ones(len(ids), dtype=bool)
        for image in images:
            mask[image.start : image.start + image.tokens] = False
        made.append(Sample(ids, mask.tolist(), number + 1, tuple(images)))
    return made


def plain_loop(name: str, model: Any) -> None:
    """Trains on one document after another, as transformers' processor and model take it."""
    media = tiny_media(name)
    groups = decay_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=EPSILON)
    tokens = sum(sum(sample.loss_mask[1:]) for sample in samples(name))
    for _ in range(STEPS):
        for parts, sample in zip(DOCUMENTS, samples(name), strict=True):
            mark = media.processor.image_token
            text = "".join(part if isinstance(part, str) else mark for part in parts)
            pixels = [open_image(content_of(ref), ref.width, ref.height, "") for ref in sample.images]
            inputs = media.processor(
                text=[text], **({"images": [pixels]} if pixels else {}), return_tensors="pt", add_special_tokens=False
            )
            logits = model(**inputs).logits[0]
            mask = torch.tensor(sample.loss_mask)[1:]
            loss = cross_entropy(logits[:-1][mask], inputs["input_ids"][0, 1:][mask], reduction="sum")
            (loss / tokens).backward()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def student_of(
    name: str,
    zero_stage: int,
    model: Any | None = None,
    read: Callable[[ImageRef], bytes] = content_of,
    **settings: Any,
) -> Any:
    """A student with images in its engine."""
    from taid_ray.student.engine import Student
    from taid_ray.student.pixels import BatchInputs

    images = BatchInputs(tiny_media(name), read)
    model = tiny_model(name) if model is None else model
    config = config_of(name, zero_stage, **settings)
    rows = model.get_output_embeddings().weight.shape[0]
    return Student(config, model, rows, World(), torch.device("cpu"), images=images)


def train(student: Any, batches: list[Batch]) -> None:
    tokens = sum(batch.num_loss_tokens for batch in batches)
    for step in range(1, STEPS + 1):
        student.begin_step(step, STEPS)
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            loss, _ = student.forward(batch, None, 0.0)
            if following:
                student.prepare(following)
            student.backward(loss / tokens)
        student.step(RATE)


@pytest.mark.parametrize(
    ("name", "zero_stage", "pack"),
    [("internvl", 3, True), ("qwen2_5_vl", 2, True), ("smolvlm", 3, False), ("llava", 0, False)],
)
def test_the_engine_follows_a_plain_loop(name: str, zero_stage: int, pack: bool) -> None:
    """Rows of several images, of one and of none in micro-batches of two, one of them without any image, and an empty one."""
    from taid_ray.student.engine_check import check_engine

    rows = sorted(to_rows(samples(name), 64, pack), key=lambda row: not row.images)
    assert not pack or len(rows) < len(DOCUMENTS)
    parts = [[row] for row in rows] if pack else [rows[:2], rows[2:4], rows[4:]]
    batches = [collate(part) for part in (*parts, [])]
    assert [bool(batch.images) for batch in batches] == [True] * (len(rows) if pack else 2) + [False] * (
        1 if pack else 2
    )

    expected = tiny_model(name)
    student = student_of(name, zero_stage)
    untrained = set(student.unreached)
    for key, parameter in expected.named_parameters():
        parameter.requires_grad_(key not in untrained)
    check_engine(student, expected.get_output_embeddings().weight.shape[0])
    train(student, batches)
    plain_loop(name, expected)

    found = student.gathered_state()
    first = dict(tiny_model(name).named_parameters())
    for key, parameter in expected.named_parameters():
        torch.testing.assert_close(
            found[key], parameter.detach(), rtol=2e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
        assert key not in untrained or torch.equal(found[key], first[key])
    tower = [key for key in first if any(part in key for part in tiny_media(name).family.vision)]
    assert any(not torch.equal(found[key], first[key]) for key in tower)
    student.images.close()


def test_a_batch_without_images_gives_the_tower_gradients_of_zero() -> None:
    """And all other gradients, and the scores, are those of the rows alone."""
    media, rows = tiny_media("internvl"), [Row(*_text("She ran home.")), Row(*_text("no"))]
    batch, plain, student = collate(rows), tiny_model("internvl"), student_of("internvl", 0)
    loss, _ = student.forward(batch, None, 0.0)
    student.backward(loss)
    logits = plain(**batch.inputs).logits.flatten(0, 1)[batch.loss_positions]
    own = cross_entropy(logits, batch.labels, reduction="sum")
    own.backward()
    torch.testing.assert_close(loss, own)
    expected = dict(plain.named_parameters())
    for key, parameter in student.causal_lm.named_parameters():
        if "vision_tower" in key or "projector" in key:
            assert parameter.grad is not None and not parameter.grad.any() and expected[key].grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-4, atol=1e-6)
    assert float(student.score(batch, None).student_ce) == pytest.approx(own.item(), rel=1e-5)
    assert media.layout(28, 28).features


def _text(text: str) -> tuple[list[int], list[int], list[int]]:
    ids, _ = row_ids(tiny_media("internvl"), text)
    return ids, list(range(len(ids))), [*ids[1:], NO_LABEL]


def test_a_row_appended_is_padded_as_batches_are() -> None:
    from taid_ray.student.pixels import with_row

    short = collate([Row(*_text("no"))])
    long = Row([7] * 9, list(range(9)), [NO_LABEL] * 9)
    ids, positions = with_row(short.inputs, torch.full((9,), 7))
    expected = collate([Row(*_text("no")), long]).inputs
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(positions, expected["position_ids"])
    ids, positions = with_row(collate([long]).inputs, torch.tensor(_text("no")[0]))
    expected = collate([long, Row(*_text("no"))]).inputs
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(positions[0], expected["position_ids"][0])


@pytest.mark.parametrize(("name", "zero_stage"), [("qwen2_5_vl", 2), ("smolvlm", 3)])
def test_what_a_student_sees_is_measured_against_grey_images(name: str, zero_stage: int) -> None:
    from taid_ray.student.seeing import own_seeing_batches

    media, memory = tiny_media(name), dict[str, bytes]()
    rows = to_rows(samples(name), 64, pack=False)
    ((batch, without),) = own_seeing_batches(rows, 8, World(), media.grey, memory)
    assert [len(images) for images in batch.images] == [1, 3, 1]
    student = student_of(name, zero_stage, read=lambda ref: memory.get(ref.digest) or content_of(ref))
    before = student.gathered_state()
    found = student.seeing(batch, without)

    plain, shown = tiny_model(name), [row for row in rows if row.images]
    for value, row, parts in zip(found, shown, [p for p in DOCUMENTS if len(p) > 1], strict=True):
        mask = torch.from_numpy(row.targets) != NO_LABEL
        text = "".join(part if isinstance(part, str) else media.processor.image_token for part in parts)
        logs = []
        for read in (content_of, media.grey):
            pixels = [open_image(read(ref), ref.width, ref.height, "") for ref in row.images]
            inputs = media.processor(text=[text], images=[pixels], return_tensors="pt", add_special_tokens=False)
            with torch.no_grad():
                logs.append(plain(**inputs).logits[0, mask].double().log_softmax(-1))
        expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
        assert value == pytest.approx(float(expected), rel=1e-3) and value > 1e-6
    assert student.seeing(batch, batch) == [0.0] * 3 and student.engine.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in student.gathered_state().items())
    assert student.seeing(collate([]), collate([])) == [0.0]


def test_frozen_parts_take_no_part_in_training() -> None:
    """No optimizer state, nothing in checkpoints, the same bits at the end; and the rest is trained with them in place."""
    from taid_ray.models.freezing import freeze

    model = tiny_model("llava")
    freeze(model, ["vision_tower"])
    student = student_of("llava", 2, model, freeze=["vision_tower"])
    assert not any("vision_tower" in key for key in student.parameters) and student.unreached == []
    batches = [collate([row]) for row in to_rows(samples("llava"), 64, True)]
    train(student, batches)
    kept = [key for key, _ in student.state()]
    assert kept and not any("vision_tower" in key for key in kept)
    found, first = student.gathered_state(), dict(tiny_model("llava").named_parameters())
    for key, parameter in first.items():
        assert torch.equal(found[key], parameter) == ("vision_tower" in key)
    trained = sum(p.numel() for p in student.parameters.values())
    whole = sum(tensor.numel() for _, tensor in floating_tensors(tiny_model("llava")))
    in_optimizer = sum(p.numel() for group in student.engine.optimizer.param_groups for p in group["params"])
    assert in_optimizer <= trained + 8 < whole
    assert tiny_config("llava").model_type == "llava"
