"""The teacher behind a cache: what it is asked for, and that nobody can tell the answers apart."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from taid_ray.config.training import CacheConfig
from taid_ray.data.batch import Batch, collate
from taid_ray.data.packing import Sample, to_rows
from taid_ray.errors import TeacherError
from taid_ray.teacher.cache import cached
from taid_ray.teacher.cache.cached import CachedTeacher
from taid_ray.teacher.cache.claims import Claims, NoClaims
from taid_ray.teacher.cache.store import CacheStore
from taid_ray.teacher.payload import TeacherOutput
from tests.support.journal import WITHIN_S, Journal

CPU = torch.device("cpu")


def sample(number: int) -> Sample:
    """Of 3 to 7 tokens that begin with its number."""
    ids = [number, *range(1, 3 + number % 5)]
    return Sample(ids, [False] + [True] * (len(ids) - 1), number)


def batch(*numbers: int, pack: bool = True) -> Batch:
    return collate(to_rows([sample(number) for number in numbers], 16, pack))


def expected(asked: Batch) -> torch.Tensor:
    """[N, 2]: each loss position's token and position, which every sample has for itself."""
    both = torch.stack([asked.inputs["input_ids"].flatten(), asked.inputs["position_ids"].flatten()], 1)
    return both[asked.loss_positions].float()


class FakeTeacher:
    """Answers when it may. `asked` holds the first tokens of the samples of each request."""

    def __init__(self) -> None:
        self.asked = Journal()
        self.tokens = 0
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.error: Exception | None = None
        self.closed = False

    def submit(self, asked: Batch) -> Batch:
        starts = asked.inputs["position_ids"] == 0
        self.tokens += asked.inputs["input_ids"].numel()
        self.asked.append(asked.inputs["input_ids"][starts].tolist())
        return asked

    def collect(self, request: Batch) -> TeacherOutput:
        assert self.may_answer.wait(WITHIN_S)
        if self.error is not None:
            raise self.error
        return TeacherOutput("hidden", {"hidden": expected(request)}, 0.5)

    def info(self) -> Any:
        def check(tensors: dict[str, torch.Tensor], n: int) -> None:
            if tensors.keys() != {"hidden"} or tensors["hidden"].shape != (n, 2):
                raise TeacherError("no answer of this teacher")

        empty = TeacherOutput("hidden", {"hidden": torch.empty(0, 2)})
        return SimpleNamespace(
            fingerprint="f", payload="hidden", packing_error=None, check_output=check, empty_output=lambda _: empty
        )

    def close(self) -> None:
        self.closed = True


Make = Callable[..., tuple[CachedTeacher, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made = []

    def make(claims: Any = None, directory: str = "cache", **values: Any) -> tuple[CachedTeacher, Any]:
        inner: Any = FakeTeacher()
        cache = CacheStore(CacheConfig(directory=str(tmp_path / directory), **values), lambda message: None)
        made.append(CachedTeacher(inner, cache, claims or NoClaims(), CPU))
        return made[-1], inner

    yield make
    for teacher in made:
        teacher.close()


def check(teacher: CachedTeacher, asked: Batch) -> TeacherOutput:
    output = teacher.collect(teacher.submit(asked))
    assert torch.equal(output.tensors["hidden"], expected(asked))
    return output


def test_only_what_is_missing_is_asked_for(make: Make) -> None:
    teacher, inner = make()
    assert check(teacher, batch(11, 12, 13)).compute_s == 0.5
    tokens = inner.tokens
    assert check(teacher, batch(13, 11)).compute_s == 0
    assert inner.tokens == teacher.tokens == tokens == batch(11, 12, 13).inputs["input_ids"].numel()
    check(teacher, batch(14, 13, 15, 12, 16))
    assert [sorted(request) for request in inner.asked] == [[11, 12, 13], [14, 15, 16]]
    assert (teacher.samples_found, teacher.samples_asked) == (4, 6)


def test_a_batch_of_which_nothing_is_known_is_sent_as_it_is(make: Make) -> None:
    teacher, inner = make()
    sent = []
    inner.submit = lambda asked: sent.append(asked) or asked
    whole = batch(21, 22, 23, pack=False)
    check(teacher, whole)
    assert sent == [whole]


def test_a_sample_that_comes_twice_is_asked_for_once(make: Make) -> None:
    teacher, inner = make()
    check(teacher, batch(11, 12, 11, 11, pack=False))
    assert sorted(inner.asked[0]) == [11, 12] and teacher.samples_asked == 2


def test_what_is_under_way_is_not_asked_for_again(make: Make) -> None:
    """As at the end of a short epoch, when the next one is read ahead."""
    teacher, inner = make()
    inner.may_answer.clear()
    batches = [batch(11, 12), batch(12, 13), batch(11, 13)]
    requests = [teacher.submit(each) for each in batches]
    last = teacher.submit(batch(14))
    inner.asked.wait_for([14])  # so all before it were looked at, while there was no answer yet
    inner.may_answer.set()
    for each, request in zip(batches, requests, strict=True):
        assert torch.equal(teacher.collect(request).tensors["hidden"], expected(each))
    teacher.collect(last)
    assert [sorted(request) for request in inner.asked] == [[11, 12], [13], [14]]


def test_samples_do_not_share_rows_where_the_teacher_cannot_keep_them_apart(make: Make) -> None:
    teacher, inner = make()
    info = inner.info()
    info.packing_error = "mixes documents"
    inner.info = lambda: info
    check(teacher, batch(11, pack=False))
    check(teacher, batch(11, 12, 13, pack=False))
    assert inner.asked[1] == [12, 13]
    assert teacher.tokens == batch(11).inputs["input_ids"].numel() + 2 * 5  # up to the last loss position of each


def test_no_loss_positions(make: Make) -> None:
    teacher, inner = make()
    assert teacher.submit(collate([])) is None
    assert len(teacher.collect(None).tensors["hidden"]) == 0 and inner.asked == []


def test_errors_arrive_where_the_answer_is_missed_and_claims_end(make: Make) -> None:
    claims = Claims()
    teacher, inner = make(claims)
    inner.error = TeacherError("out of order")
    request = teacher.submit(batch(11, 12))
    with pytest.raises(TeacherError, match="out of order"):
        teacher.collect(request)
    inner.error = None
    check(teacher, batch(11, 12))
    assert claims._held == {}


def test_concurrent_trials_compute_each_sample_once(make: Make) -> None:
    claims, trials = Claims(), 4
    teachers = [make(claims) for _ in range(trials)]
    orders = [
        [(10 + (i * step + offset) % 24) for i in range(24)] for step, offset in ((1, 0), (5, 3), (7, 11), (11, 2))
    ]
    problems: list[BaseException] = []

    def run(teacher: CachedTeacher, order: list[int]) -> None:
        try:
            batches = [batch(*order[i : i + 3]) for i in range(0, len(order), 3)]
            waiting = [teacher.submit(each) for each in batches[:3]]
            for i, each in enumerate(batches):
                output = teacher.collect(waiting.pop(0))
                assert torch.equal(output.tensors["hidden"], expected(each))
                if i + 3 < len(batches):
                    waiting.append(teacher.submit(batches[i + 3]))
        except BaseException as error:
            problems.append(error)

    threads = [
        threading.Thread(target=run, args=(teacher, order))
        for (teacher, _), order in zip(teachers, orders, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    assert problems == []
    asked = sorted(number for _, inner in teachers for request in inner.asked for number in request)
    assert asked == list(range(10, 34))
    assert claims._held == {}


def test_trials_that_wait_for_each_other_both_get_on(make: Make) -> None:
    """Each has claimed, with its second batch, what the other one needs for its first."""
    claims = Claims()
    (first, one), (second, two) = make(claims), make(claims)
    one.may_answer.clear()
    two.may_answer.clear()
    early = [first.submit(batch(11)), second.submit(batch(12))]
    one.asked.wait_for([11])
    two.asked.wait_for([12])
    late = [first.submit(batch(12, 13)), second.submit(batch(11, 14))]
    one.asked.wait_for([13])
    two.asked.wait_for([14])
    later = [first.submit(batch(14)), second.submit(batch(13))]
    last = [first.submit(batch(15)), second.submit(batch(16))]
    one.asked.wait_for([15])
    two.asked.wait_for([16])
    one.may_answer.set()
    two.may_answer.set()
    for teacher, request, asked in zip(
        [first, second] * 4,
        [*early, *late, *later, *last],
        [batch(*ids) for ids in ((11,), (12,), (12, 13), (11, 14), (14,), (13,), (15,), (16,))],
        strict=True,
    ):
        assert torch.equal(teacher.collect(request).tensors["hidden"], expected(asked))
    assert sorted(number for inner in (one, two) for request in inner.asked for number in request) == [*range(11, 17)]


class Watched(Claims):
    """Tells of the refusals."""

    def __init__(self, clock: Callable[[], float]):
        super().__init__(clock)
        self.refused = Journal()

    def claim(self, holder: str, keys: Sequence[str]) -> list[bool]:
        granted = super().claim(holder, keys)
        if not all(granted):
            self.refused.append(keys)
        return granted


def test_a_killed_holder_delays_and_does_no_more(make: Make) -> None:
    clock = [100.0]
    claims = Watched(lambda: clock[0])
    teacher, inner = make(claims)
    claims.claim("killed", teacher._scoped([sample.key for sample in cut(batch(11, 12))]))
    request = teacher.submit(batch(11, 12, 13))
    claims.refused.wait_length(4)  # when it was looked at, and while it is waited for
    assert inner.asked == [[13]]
    clock[0] += 60
    assert torch.equal(teacher.collect(request).tensors["hidden"], expected(batch(11, 12, 13)))
    assert [sorted(request) for request in inner.asked] == [[13], [11, 12]]


def cut(asked: Batch) -> Any:
    from taid_ray.teacher.cache.samples import samples_of

    return samples_of(asked, "f", False)


def test_who_does_not_see_the_same_directory_does_not_wait(make: Make) -> None:
    claims = Claims()
    (first, one), (second, two) = make(claims), make(claims, directory="another node's")
    one.may_answer.clear()
    request = first.submit(batch(11))
    one.asked.wait_for([11])
    check(second, batch(11))
    one.may_answer.set()
    first.collect(request)
    assert one.asked == two.asked == [[11]]


def test_a_cache_that_keeps_nothing_changes_nothing(make: Make) -> None:
    teacher, inner = make(Claims(), disk_gib=1e-9)
    for _ in range(2):
        check(teacher, batch(11, 12))
    assert len(inner.asked) == 2


def test_what_the_cache_holds_of_another_shape_is_asked_for(make: Make) -> None:
    teacher, inner = make()
    (key,) = [sample.key for sample in cut(batch(11))]
    teacher._cache.put(key, {"hidden": torch.zeros(1, 2)})
    check(teacher, batch(11))
    assert inner.asked == [[11]]


def test_close_ends_the_threads_and_the_waiting(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "CLOSE_S", WITHIN_S)
    claims = Claims()
    teacher, inner = make(claims)
    claims.claim("other", teacher._scoped([sample.key for sample in cut(batch(11))]))
    request = teacher.submit(batch(11))
    teacher.close()
    with pytest.raises(TeacherError, match="closed"):
        teacher.collect(request)
    assert inner.closed and not any(thread.is_alive() for thread in teacher._threads)
