import threading
from collections.abc import Iterator
from math import ceil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.data.batching import num_micro_batches, split_evenly
from taid_ray.data.cursor import BlockCursor
from taid_ray.distributed.world import World
from taid_ray.student.clock import PhaseClock
from taid_ray.student.prefetch import Prefetcher, StepBatches, read_ahead, step_batches
from taid_ray.teacher.payload import TeacherOutput
from tests.support.journal import WITHIN_S, Journal


def row(number: int) -> Row:
    """A row that can be recognised: its number is its first token. Every third row carries less loss.

    It holds the document of its number and the one after, in falling order.
    """
    return Row([number, 1, 2], [0, 1, 2], [1, 2 if number % 3 else NO_LABEL, NO_LABEL], (number + 1, number))


def numbers(batch: Batch) -> list[int]:
    """The rows of a batch; 0 is the padding of an empty one."""
    return [n for n in batch.inputs["input_ids"][:, 0].tolist() if n]


def global_batches(steps: int, size: int) -> Iterator[tuple[list[Row], BlockCursor]]:
    for step in range(steps):
        first = step * size + 1
        yield [row(n) for n in range(first, first + size)], BlockCursor(samples=first + size - 1)


@settings(deadline=None)
@given(st.lists(st.integers(), max_size=50), st.integers(1, 20))
def test_split_evenly(items: list[Any], parts: int) -> None:
    pieces = split_evenly(items, parts)
    lengths = [len(piece) for piece in pieces]
    assert len(pieces) == parts and [item for piece in pieces for item in piece] == items
    assert max(lengths) - min(lengths) <= 1


layouts = {"size": st.integers(1, 40), "micro": st.integers(1, 12), "world": st.integers(1, 9)}


@pytest.mark.parametrize(
    "size, micro, world, expected",
    [(8, 8, 1, 1), (8, 3, 1, 3), (9, 4, 2, 2), (8, 4, 2, 1), (1, 4, 8, 1), (10, 1, 4, 3)],
)
def test_num_micro_batches_by_hand(size: int, micro: int, world: int, expected: int) -> None:
    assert num_micro_batches(size, micro, world) == expected


@settings(max_examples=200, deadline=None)
@given(**layouts)
def test_every_row_once_and_no_micro_batch_too_large(size: int, micro: int, world: int) -> None:
    accumulation = num_micro_batches(size, micro, world)
    ranks = [list(step_batches(global_batches(2, size), World(rank, world), accumulation)) for rank in range(world)]
    for number, (rows, cursor) in enumerate(global_batches(2, size)):
        parts = [steps[number] for steps in ranks]
        assert [n for part in parts for batch in part.batches for n in numbers(batch)] == [r.input_ids[0] for r in rows]
        assert {len(part.batches) for part in parts} == {accumulation}  # all join the same collectives
        assert all(len(numbers(batch)) <= micro for part in parts for batch in part.batches)
        assert {part.num_loss_tokens for part in parts} == {sum(r.num_loss_tokens for r in rows)}
        assert sum(batch.num_loss_tokens for part in parts for batch in part.batches) == parts[0].num_loss_tokens
        assert {part.cursor for part in parts} == {cursor}
        for part in parts:
            own = {n for batch in part.batches for n in numbers(batch)}
            assert part.documents == sorted(own | {n + 1 for n in own})
    # and no more micro-batches than the largest share needs
    assert accumulation == ceil(ceil(size / world) / micro)


class FakeTeacher:
    """Answers with the rows' numbers; remembers the order of calls and what is in flight."""

    def __init__(self) -> None:
        self.log: list[tuple[str, list[int]]] = []
        self.in_flight: list[list[int]] = []
        self.most = 0

    def submit(self, batch: Batch) -> list[int]:
        request = numbers(batch)
        self.log.append(("submit", request))
        self.in_flight.append(request)
        self.most = max(self.most, len(self.in_flight))
        return request

    def collect(self, request: list[int]) -> TeacherOutput:
        self.log.append(("collect", request))
        self.in_flight.remove(request)
        return TeacherOutput("hidden", {"hidden": torch.tensor(request)})

    def info(self) -> Any:
        return SimpleNamespace(bytes_per_token=10)


def prefetcher(steps: int, accumulation: int, window: int, window_bytes: int = 10**9) -> tuple[Prefetcher, FakeTeacher]:
    teacher: Any = FakeTeacher()
    batches = step_batches(global_batches(steps, 4), World(), accumulation)
    return Prefetcher(batches, teacher, window, window_bytes, PhaseClock(torch.device("cpu"))), teacher


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 30))
def test_prefetcher_hands_out_everything_in_order(steps: int, accumulation: int, window: int) -> None:
    stream, teacher = prefetcher(steps, accumulation, window)
    for step, (rows, cursor) in enumerate(global_batches(steps, 4), 1):
        work = stream.next_step()
        assert work.cursor == cursor  # the position of the consumed step, however far ahead the reading is
        found = [stream.collect() for _ in work.batches]
        assert [batch for batch, _ in found] == work.batches
        assert [output.tensors["hidden"].tolist() for _, output in found] == [numbers(batch) for batch in work.batches]
        assert [n for batch, _ in found for n in numbers(batch)] == [r.input_ids[0] for r in rows]
        left = (steps - step) * accumulation
        assert len(teacher.in_flight) == min(window, left)  # always as far ahead as allowed
    for _ in range(2):
        with pytest.raises(StopIteration):
            stream.next_step()
    assert teacher.most == min(window, steps * accumulation)
    submitted = [request for kind, request in teacher.log if kind == "submit"]
    assert submitted == [request for kind, request in teacher.log if kind == "collect"]
    assert len(submitted) == steps * accumulation and not teacher.in_flight


def test_requests_cross_the_step_boundary_before_the_step_is_over() -> None:
    stream, teacher = prefetcher(steps=3, accumulation=2, window=3)
    assert teacher.log == [("submit", [1, 2]), ("submit", [3, 4]), ("submit", [5, 6])]  # before anybody asks
    stream.next_step()
    stream.collect()
    assert teacher.log[3:] == [("collect", [1, 2]), ("submit", [7, 8])]


def test_a_request_is_sent_before_the_one_ahead_of_it_is_collected() -> None:
    stream, teacher = prefetcher(steps=4, accumulation=1, window=2)
    for _ in range(4):
        stream.next_step()
        stream.collect()
    position = {entry: number for number, entry in enumerate((kind, request[0]) for kind, request in teacher.log)}
    for first in (1, 5, 9):
        assert position["submit", first + 4] < position["collect", first]


@pytest.mark.parametrize("tokens, in_flight", [(1, 1), (13, 1), (14, 2), (19, 2), (20, 3), (100, 5)])
def test_the_window_is_bounded_in_bytes_too(tokens: int, in_flight: int) -> None:
    """Five requests of 7, 7, 6, 7 and 7 loss positions, 10 bytes each. One is always in flight, or nothing would move."""
    stream, teacher = prefetcher(steps=5, accumulation=1, window=99, window_bytes=10 * tokens)
    assert len(teacher.in_flight) == in_flight
    for _ in range(5):
        stream.next_step()
        stream.collect()
    assert not teacher.in_flight


def test_wait_is_the_time_spent_in_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 20.0, 23.0])
    monkeypatch.setattr("taid_ray.student.prefetch.perf_counter", lambda: next(clock))
    stream, _ = prefetcher(steps=2, accumulation=1, window=1)
    assert stream.wait_s == 0
    stream.next_step()
    stream.collect()
    assert stream.wait_s == 0.5
    stream.next_step()
    stream.collect()
    assert stream.wait_s == 3.5


def test_an_error_in_the_data_comes_out() -> None:
    def broken() -> Iterator[StepBatches]:
        yield StepBatches([collate([row(1)])], 2, BlockCursor())
        raise ValueError("bad row")

    teacher: Any = FakeTeacher()
    stream = Prefetcher(broken(), teacher, 1, 10**9, PhaseClock(torch.device("cpu")))
    stream.next_step()
    with pytest.raises(ValueError, match="bad row"):
        stream.collect()


@settings(deadline=None)
@given(st.lists(st.integers() | st.none(), max_size=20), st.integers(1, 5))
def test_read_ahead_changes_nothing(items: list[Any], depth: int) -> None:
    assert list(read_ahead(iter(items), depth)) == items


def test_read_ahead_works_while_nobody_takes_but_not_without_limit() -> None:
    made, taken, depth = Journal(), [0], 2

    def make() -> Iterator[int]:
        for number in range(100):
            made.append((number, taken[0]))
            yield number

    items = read_ahead(make(), depth)
    for number in range(100):
        taken[0] += 1
        assert next(items) == number
        # One taken, two waiting, and one ready to join them: without anybody taking more, but with nothing beyond.
        made.wait_length(min(100, number + depth + 2))
    assert list(items) == []
    assert all(number < at + depth + 1 for number, at in made)


def test_read_ahead_raises_an_error_in_its_place() -> None:
    broken = threading.Event()

    def make() -> Iterator[int]:
        yield 1
        yield 2
        broken.set()
        raise ValueError("bad row")

    items = read_ahead(make(), 8)
    assert next(items) == 1
    assert broken.wait(WITHIN_S)
    assert next(items) == 2
    with pytest.raises(ValueError, match="bad row"):
        next(items)


def test_without_a_teacher_batches_pass_through() -> None:
    """In order, each when it is collected, and nobody is asked."""
    steps = list(step_batches(global_batches(3, 4), World(), 2))
    stream = Prefetcher(iter(steps), None, 1, 0, PhaseClock(torch.device("cpu")))
    found = []
    for step in steps:
        assert stream.next_step() is step
        found += [stream.collect() for _ in step.batches]
    assert [numbers(batch) for batch, _ in found] == [[n, n + 1] for n in range(1, 12, 2)]
    assert all(output is None for _, output in found)


def test_each_batch_is_announced_one_before_it_is_collected() -> None:
    """Whoever processes its images has the time in which the batch before is computed, and holds no more than two."""
    told: list[Batch] = []
    steps = list(step_batches(global_batches(2, 4), World(), 2))
    stream = Prefetcher(iter(steps), None, 3, 0, PhaseClock(torch.device("cpu")), told.append)
    collected = []
    for _ in steps:
        stream.next_step()
        for _ in range(2):
            assert len(told) == len(collected) + 1
            collected.append(stream.collect()[0])
    assert all(one is other for one, other in zip(told, collected, strict=True))
