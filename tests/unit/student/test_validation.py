"""The held-out rows: what the teacher is asked for, and how often."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from taid_ray.data.batch import NO_LABEL, Batch, Row
from taid_ray.distributed.world import World
from taid_ray.student import validation
from taid_ray.student.validation import ValidationBatches
from taid_ray.teacher.payload import TeacherOutput

WINDOW = 3


class Teacher:
    """Answers in the order of the requests, as the pool's client does; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.waiting: deque[Batch] = deque()
        self.most = self.most_tokens = 0

    def info(self) -> Any:
        return SimpleNamespace(bytes_per_token=8)

    def submit(self, batch: Batch) -> Batch:
        self.asked.append(batch.num_loss_tokens)
        self.waiting.append(batch)
        self.most = max(self.most, len(self.waiting))
        self.most_tokens = max(self.most_tokens, sum(each.num_loss_tokens for each in self.waiting))
        return batch

    def collect(self, request: Batch) -> TeacherOutput:
        assert self.waiting.popleft() is request
        return TeacherOutput(
            "hidden", {"hidden": torch.full((request.num_loss_tokens, 4), request.num_loss_tokens)}, 0.1
        )


def rows(count: int) -> list[Row]:
    """Of 2, 3, 4 ... tokens, all but the last of which carry loss."""
    lengths = range(2, count + 2)
    return [Row([1] * n, list(range(n)), [1] * (n - 1) + [NO_LABEL]) for n in lengths]


def held_out(teacher: Any, count: int = 10, world: World | None = None, window_bytes: int = 2**20) -> ValidationBatches:
    return ValidationBatches(rows(count), world or World(), 2, teacher, (WINDOW, window_bytes))


def once(found: ValidationBatches) -> list[tuple[int, list[float]]]:
    """Of each batch its loss positions, and the outputs' values."""
    return [(batch.num_loss_tokens, output.tensors["hidden"].unique().tolist()) for batch, output in found.each(nobody)]


def nobody(batch: Batch) -> None:
    """Is told of a batch, and does nothing."""


def test_the_teacher_is_asked_once_for_rows_that_never_change() -> None:
    teacher = Teacher()
    found = held_out(teacher)
    first = once(found)
    assert [tokens for tokens, _ in first] == [3, 7, 11, 15, 19] and all([tokens] == values for tokens, values in first)
    assert once(found) == first and once(found) == first
    assert teacher.asked == [3, 7, 11, 15, 19] and teacher.most == WINDOW
    assert [output.compute_s for _, output in found.each(nobody)] == [0.0] * 5, "nothing is computed again"


def test_what_does_not_fit_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "KEPT_BYTES", (3 + 11) * 4 * 8)
    teacher = Teacher()
    found = held_out(teacher)
    first = once(found)
    assert once(found) == first and once(found) == first
    assert teacher.asked == [3, 7, 11, 15, 19] + [11, 15, 19] * 2


def test_what_is_kept_is_no_view_of_what_came() -> None:
    """Answers lie in the object store, and would hold its room for as long as the run lasts."""
    teacher = Teacher()
    found = held_out(teacher)
    for _, output in found.each(nobody):
        output.tensors["hidden"].fill_(-1)
    assert all([tokens] == values for tokens, values in once(found))


def test_no_more_bytes_are_under_way_than_the_window_has() -> None:
    """One request always is, however large its answer."""
    teacher = Teacher()
    once(held_out(teacher, window_bytes=8 * 18))
    assert teacher.asked == [3, 7, 11, 15, 19] and teacher.most_tokens == 19
    once(held_out(teacher, window_bytes=1))
    assert teacher.most_tokens == 19


def test_a_rank_without_rows_takes_part() -> None:
    """All ranks come to the same number of collectives."""
    shares = [once(held_out(Teacher(), 3, World(rank, 4))) for rank in range(4)]
    assert [len(share) for share in shares] == [1] * 4
    assert [tokens for share in shares for tokens, _ in share] == [0, 1, 2, 3]


def test_without_a_teacher_there_are_batches_only() -> None:
    found = held_out(None)
    assert not found.has_teacher
    assert [(batch.num_loss_tokens, output) for batch, output in found.each(nobody)] == [
        (n, None) for n, _ in once(held_out(Teacher()))
    ]
