from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.config.schema import build_config
from taid_ray.data.batch import NO_LABEL, Batch, Row
from taid_ray.distributed.world import World
from taid_ray.errors import DataError, TeacherError
from taid_ray.media.refs import ImageRef
from taid_ray.student.open_teacher import check_seeing
from taid_ray.student.seeing import SEEING_ROWS, own_seeing_batches, seeing_batches, seeing_note, teacher_seeing
from taid_ray.student.totals import Evaluation, RunTotals
from taid_ray.student.validator import Validator

IMAGE = ImageRef("a" * 32, 1, 2, 64, 48, "file:a.png")


def row(*images: ImageRef, loss: bool = True) -> Row:
    return Row([5, 9, 9, 6], [0, 1, 2, 3], [NO_LABEL, NO_LABEL, 6 if loss else NO_LABEL, NO_LABEL], images=images)


def grey(image: ImageRef) -> bytes:
    return f"{image.width}x{image.height}".encode()


def test_the_first_rows_with_images_are_shown_with_grey_ones_too() -> None:
    wide = replace(IMAGE, width=100)
    memory: dict[str, bytes] = {}
    batches = seeing_batches([row(), row(IMAGE), row(wide, loss=False), row(wide)], 1, grey, memory)
    assert [batch.images for batch, _ in batches] == [((IMAGE,),), ((wide,),)]
    for batch, without in batches:
        (found,), (image,) = without.images[0], batch.images[0]
        assert memory[found.digest] == grey(image) and found.place == "memory:"
        assert replace(found, digest=image.digest, place=image.place) == image
        assert without.inputs is batch.inputs and without.loss_positions is batch.loss_positions
    assert len(memory) == 2


def test_documents_of_a_packed_row_are_looked_at_one_by_one() -> None:
    """One without an image would hide what the other's image changes."""
    ids, positions, targets = [5, 6, 5, 9, 9, 6], [0, 1, 0, 1, 2, 3], [6, NO_LABEL, NO_LABEL, NO_LABEL, 6, NO_LABEL]
    ((batch, without),) = seeing_batches([Row(ids, positions, targets, images=(replace(IMAGE, start=3),))], 4, grey, {})
    assert batch.inputs["input_ids"].tolist() == [[5, 9, 9, 6]] and batch.inputs["position_ids"].tolist() == [
        [0, 1, 2, 3]
    ]
    assert batch.images == ((IMAGE,),) and (batch.loss_positions.tolist(), batch.labels.tolist()) == ([2], [6])
    assert without.images[0][0].start == 1


def test_only_so_many_rows_are_looked_at() -> None:
    batches = seeing_batches([row(IMAGE)] * 50, 5, grey, {})
    assert [len(batch.images) for batch, _ in batches] == [5] * 6 + [2] and SEEING_ROWS == 32


def test_rows_without_images_show_nothing() -> None:
    with pytest.raises(DataError, match=r"none of the 3 validation rows has an image, .*data\.valid_documents"):
        seeing_batches([row()] * 3, 2, grey, {})


def test_ranks_share_the_rows_by_which_the_student_is_measured() -> None:
    """As many batches on every rank, so that all come to the same collectives."""
    rows = [row(replace(IMAGE, width=number)) for number in range(1, 6)]
    shares = [own_seeing_batches(rows, 2, World(rank, 4), grey, {}) for rank in range(4)]
    assert [len(share) for share in shares] == [1] * 4
    widths = [[image.width for images in batch.images for image in images] for ((batch, _),) in shares]
    assert [width for share in widths for width in share] == [1, 2, 3, 4, 5] and min(map(len, widths)) == 1


def test_a_validation_says_whether_the_student_sees() -> None:
    batches = seeing_batches([row(IMAGE)] * 3, 2, grey, {})
    values, said = [[0.0], [0.002, 0.5], [0.5], [0.6, 0.7]], []
    student: Any = SimpleNamespace(
        world=World(), seeing=lambda *_: values.pop(0), config=SimpleNamespace(data=SimpleNamespace(sees_at_least=0.01))
    )
    telemetry: Any = SimpleNamespace(validating=lambda *_: None, validation=lambda *_: None, note=said.append)
    totals = RunTotals()
    validator = Validator(student, {}, totals, telemetry, batches)
    evaluation = Evaluation(1.0, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taid_ray.student.validator.together", lambda _: evaluation)
        validator.validate(0)
        validator.validate(5)
    assert [line["seeing"] for line in totals.validation_lines()] == [0.002, 0.6]
    assert said[0].startswith("warning: the student does not see (data.sees_at_least = 0.01): with grey images")
    assert said[1].startswith("with grey images the student's answers differ by 0.6 nats")
    assert Evaluation.from_dict(totals.validation_lines()[1]).seeing == 0.6
    assert "seeing" not in evaluation.to_dict()


def teacher(values: list[float]) -> Any:
    left = list(values)

    def seeing(batch: Batch, without: Batch) -> list[float]:
        return [left.pop(0) for _ in batch.images]

    return SimpleNamespace(seeing=seeing)


def test_a_teacher_that_sees_too_little_is_refused_with_both_numbers() -> None:
    batches = seeing_batches([row(IMAGE)] * 3, 2, grey, {})
    assert teacher_seeing(teacher([0.5, 0.0, 0.01]), batches, 0.01) == [0.5, 0.0, 0.01]
    with pytest.raises(
        TeacherError, match=r"differ by 0\.0003 nats \(median of 3 rows, .* data\.sees_at_least = 0\.01;"
    ):
        teacher_seeing(teacher([0.5, 0.0003, 0.0]), batches, 0.01)
    with pytest.raises(TeacherError, match="nan"):
        teacher_seeing(teacher([float("nan")] * 3), batches, 0.0)


@pytest.mark.parametrize(("mode", "measured"), [("pool", 3), ("cache", 2)])
def test_a_run_measures_its_teacher_or_takes_what_was_measured(mode: str, measured: int, tmp_path: Any) -> None:
    tree = {
        "teacher": {"model": "t", "mode": mode}, "student": {"model": "s"}, "data": {"train": "d"},
        "train": {"steps": 1, "batch_size": 2, "micro_batch_size": 2}, "cache": {"directory": str(tmp_path)},
    }  # fmt: skip
    said: list[str] = []
    context: Any = SimpleNamespace(config=build_config(tree), note=said.append)
    images: Any = SimpleNamespace(processor=SimpleNamespace(grey=grey), memory={})
    check_seeing(context, teacher([0.5, 0.25, 0.125]), [row(IMAGE)] * 3, images)
    assert (
        f"the teacher's answers differ by {0.25 if measured == 3 else 0.38:.2g} nats (median of {measured} rows"
        in said[0]
    )
    with pytest.raises(TeacherError, match="does not see"):
        check_seeing(context, teacher([0.0] * 3), [row(IMAGE)] * 3, images)
    check_seeing(context, None, [row(IMAGE)], images)
    check_seeing(context, teacher([]), [row()], None)
    assert len(said) == 1


def test_the_note_says_how_many_rows_were_seen() -> None:
    said = seeing_note("student", [0.5, 0.0003, 0.02, 0.02], 0.01)
    assert (
        "student's answers differ by 0.02 nats (median of 4 rows with images, of 32 wanted), by 0.01 or more in 75%"
        in said
    )
    assert "wanted" not in seeing_note("teacher", [1.0] * 32, 0.01)
