"""When requests to a pool are sent again, and which answer wins. No Ray runs."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import xxhash
from ray.exceptions import ActorDiedError, RaySystemError, RayTaskError

from taid_ray.config.models import TeacherConfig
from taid_ray.data.batch import Batch, collate
from taid_ray.data.packing import Sample, to_rows
from taid_ray.distributed.world import World
from taid_ray.errors import DataError, MessageError, TeacherError
from taid_ray.losses.projection import LogitTransform
from taid_ray.media.refs import ImageRef
from taid_ray.teacher.pool import client
from taid_ray.teacher.pool import request as module
from taid_ray.teacher.pool.client import PoolTeacher
from taid_ray.teacher.pool.hedging import Hedge, LatencyTracker
from taid_ray.teacher.pool.messages import AlreadyHereError, ScoreRequest, ScoreResponse, contents_of
from taid_ray.teacher.pool.request import PendingRequest, ResponseWaiter
from taid_ray.teacher.protocol import TeacherInfo
from taid_ray.teacher.wire import digest, pack


def patience(multiple: float, waits: list[tuple[float, float, str]]) -> LatencyTracker:
    """After answers of (time since the one before, compute_s, replica), all submitted long before; the last at 1000."""
    found, now = LatencyTracker(multiple), 1000.0 - sum(wait for wait, _, _ in waits)
    found._last = now
    for wait, compute_s, replica in waits:
        now += wait
        found.answered(0.0, now, ScoreResponse({}, compute_s, replica, ""))
    return found


TWO = [(2.0, 2.0, "a"), (2.0, 2.0, "b")] * 4


def test_a_request_is_late_after_a_multiple_of_the_median_since_it_could_have_been_served() -> None:
    found = patience(5.0, TWO)
    assert found.limit_s == 10.0
    assert found.hedge(submitted=3.0).at == pytest.approx(1010.0)  # the replicas were busy until 1000
    assert found.hedge(submitted=1004.0).at == pytest.approx(1014.0)
    assert patience(5.0, [*TWO, (500.0, 2.0, "a")]).limit_s == 10.0  # one straggler does not change what is usual


@pytest.mark.parametrize(
    ("multiple", "waits"),
    [
        (5.0, TWO[:7]),  # too few answers
        (5.0, [(2.0, 2.0, "a")] * 64),  # only one replica
        (5.0, TWO + [(2.0, 2.0, "a")] * 64),  # only one of late
        (0.0, TWO),  # switched off
    ],
)
def test_nothing_is_late_while_too_little_is_known(multiple: float, waits: list[tuple[float, float, str]]) -> None:
    assert math.isinf(patience(multiple, waits).hedge(0.0).at)


def test_nothing_is_late_within_a_second() -> None:
    assert patience(5.0, [(0.01, 0.01, "a"), (0.01, 0.01, "b")] * 8).limit_s == 1.0


def test_answers_that_come_in_groups_do_not_make_the_others_late() -> None:
    """Eight replicas of 10 s each: seven of eight answers are there at once."""
    waits = [(0.0 if place else 10.0, 10.0, str(place)) for _ in range(4) for place in range(8)]
    assert patience(3.0, waits).limit_s == 30.0


def test_attempts_are_bounded_and_refusals_tried_again_ever_later() -> None:
    hedge, now, waits = Hedge(10.0, 5.0), 10.0, []
    while not math.isinf(hedge.at):
        hedge.sent(now)
        hedge.refused(now)
        waits.append(hedge.at - now)
        now = min(hedge.at, now + 1000)
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 16, math.inf]
    stuck = Hedge(10.0, 5.0)
    stuck.sent(10.0)
    assert stuck.at == 15.0
    never = Hedge(math.inf, math.inf)
    never.refused(3.0)  # a request sent again after a loss
    assert math.isinf(never.at)


class Clock:
    """Time that passes as soon as somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(client, "time", clock)
    return clock


class Response:
    """What Serve returns: answers after `delay` seconds, or never."""

    def __init__(self, clock: Clock, delay: float, answer: Any):
        self.clock, self.ready, self.answer, self.cancelled = clock, clock.now + delay, answer, False

    def result(self, timeout_s: float) -> Any:
        left = self.ready - self.clock.now
        self.clock.sleep(max(0.0, min(left, timeout_s)))
        if left > timeout_s:
            raise TimeoutError
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        self.cancelled = True
        raise RuntimeError("what cancelling raises is of no interest")


class Sender:
    """Gives the responses of a list, in its order."""

    def __init__(self, clock: Clock, *responses: tuple[float, Any]):
        self.clock, self.planned, self.sent, self.ids = clock, list(responses), [], set[str]()

    def __call__(self, request_id: str) -> Response:
        self.ids.add(request_id)
        self.sent.append(Response(self.clock, *self.planned.pop(0)))
        return self.sent[-1]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def waiter(said: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., ResponseWaiter]:
    monkeypatch.setattr(module, "find_lease", lambda _: object())
    return lambda **values: ResponseWaiter("pool", TeacherConfig(model="t", **values), said.append)


NEVER = math.inf


def test_the_second_replica_wins(clock: Clock, waiter: Callable[..., ResponseWaiter], said: list[str]) -> None:
    sender = Sender(clock, (NEVER, "slow"), (0.1, "quick"))
    request = PendingRequest(sender)
    start = clock.now
    assert waiter().answer(request, Hedge(start + 0.1, 5.0, 0.02)) == "quick"
    assert 0.2 <= clock.now - start + 1e-6 < 0.2 + 3 * module.WAIT_TIMES.turn
    assert sender.sent[0].cancelled and not sender.sent[1].cancelled and not request.responses
    assert len(sender.ids) == 1
    assert len(said) == 1 and "where 0.0 s are usual; asking another replica, too" in said[0]


def test_the_first_replica_may_still_win(clock: Clock, waiter: Callable[..., ResponseWaiter], said: list[str]) -> None:
    sender = Sender(clock, (0.3, "slow"), (NEVER, "stuck"))
    assert waiter().answer(PendingRequest(sender), Hedge(clock.now + 0.1, 5.0)) == "slow"
    assert sender.sent[1].cancelled


def test_a_second_request_that_reaches_the_same_replica_is_sent_again(
    clock: Clock, waiter: Callable[..., ResponseWaiter], said: list[str]
) -> None:
    refused = (0.0, AlreadyHereError("here"))
    sender = Sender(clock, (NEVER, "slow"), refused, refused, (NEVER, "stuck, too"), (0.0, "quick"))
    start = clock.now
    assert waiter().answer(PendingRequest(sender), Hedge(start, 0.3)) == "quick"
    assert clock.now - start == pytest.approx(0.25 + 0.5 + 0.3, abs=0.1)
    assert len(sender.sent) == 5 and len(said) == 1


def test_a_lost_request_is_sent_again(clock: Clock, waiter: Callable[..., ResponseWaiter], said: list[str]) -> None:
    sender = Sender(clock, (0.0, ActorDiedError()), (0.0, AlreadyHereError("here")), (0.0, "answer"))
    assert waiter().answer(PendingRequest(sender)) == "answer"
    assert len(said) == 1 and "lost a request (ActorDiedError" in said[0]


def test_losing_one_of_two_leaves_the_other(
    clock: Clock, waiter: Callable[..., ResponseWaiter], said: list[str]
) -> None:
    sender = Sender(clock, (0.2, ActorDiedError()), (0.4, "answer"))
    assert waiter().answer(PendingRequest(sender), Hedge(clock.now, 5.0)) == "answer"
    assert len(sender.sent) == 2


def test_a_removed_pool_ends_the_wait(
    clock: Clock, waiter: Callable[..., ResponseWaiter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_lease", lambda _: None)
    with pytest.raises(TeacherError, match="was removed while a worker waited"):
        waiter().answer(PendingRequest(Sender(clock, (0.0, ActorDiedError()))))


def test_what_the_teacher_raises_is_raised_once(clock: Clock, waiter: Callable[..., ResponseWaiter]) -> None:
    for cause, text in (
        (TeacherError("bad ids"), "^bad ids$"),
        (TimeoutError("x"), "failed on a request: TimeoutError"),
    ):
        error = RayTaskError("score", "", cause).as_instanceof_cause()
        with pytest.raises(TeacherError, match=text):
            waiter().answer(PendingRequest(Sender(clock, (0.0, error))))


def test_the_deadline_names_the_last_loss(clock: Clock, waiter: Callable[..., ResponseWaiter]) -> None:
    start = clock.now
    with pytest.raises(TeacherError, match=r"no answer .* after 30 s \(teacher.timeout_s\); last failure: ActorDied"):
        waiter(timeout_s=30.0).answer(PendingRequest(Sender(clock, (0.0, ActorDiedError()), (NEVER, ""))))
    assert clock.now - start == pytest.approx(30.0)


def test_long_waits_are_told_only_if_somebody_waits(
    clock: Clock, waiter: Callable[..., ResponseWaiter], said: list[str]
) -> None:
    request = PendingRequest(Sender(clock, (50.0, "answer")))
    waiter().answer(request)
    assert said == []
    request = PendingRequest(Sender(clock, (50.0, "answer")))
    request.wanted = True
    waiter().answer(request)
    assert said == [f"still waiting for the teacher pool after {seconds} s" for seconds in (15, 30, 45)]


def test_closing_ends_the_wait(clock: Clock, waiter: Callable[..., ResponseWaiter]) -> None:
    found, start = waiter(), clock.now

    class Closing(Response):
        def result(self, timeout_s: float) -> Any:
            found.stopped = clock.now - start > 5
            return super().result(timeout_s)

    with pytest.raises(TeacherError, match="was closed"):
        found.answer(PendingRequest(lambda _: Closing(clock, NEVER, "")))
    assert clock.now - start < 5 + 3 * module.WAIT_TIMES.look


def test_a_request_that_arrived_damaged_is_sent_again(
    clock: Clock, waiter: Callable[..., ResponseWaiter], said: list[str]
) -> None:
    error = RayTaskError("score", "", MessageError("no checksum (at replica a)")).as_instanceof_cause()
    sender = Sender(clock, (0.0, error), (0.0, "answer"))
    assert waiter().answer(PendingRequest(sender)) == "answer"
    assert said == ["the teacher pool received a damaged request (no checksum (at replica a)); asking again"]
    with pytest.raises(TeacherError, match=r"^no checksum \(at replica a\); the teacher pool was asked 3 times"):
        waiter().answer(PendingRequest(Sender(clock, *[(0.0, error)] * 3)))


def test_what_ray_cannot_read_is_asked_for_again(
    clock: Clock, waiter: Callable[..., ResponseWaiter], said: list[str]
) -> None:
    error = RaySystemError(ValueError("unpickling stack underflow"), "Traceback ...")
    assert waiter().answer(PendingRequest(Sender(clock, (0.0, error), (0.0, "answer")))) == "answer"
    assert len(said) == 1 and "stack underflow); asking again" in said[0] and "Traceback" not in said[0]


def test_a_damaged_answer_does_not_end_the_wait_for_the_other_replica(
    clock: Clock, waiter: Callable[..., ResponseWaiter]
) -> None:
    sender = Sender(clock, (0.2, MessageError("bad")), (0.4, "answer"))
    assert waiter().answer(PendingRequest(sender), Hedge(clock.now, 5.0)) == "answer"
    assert len(sender.sent) == 2


def test_the_deadline_is_over_all_tries(clock: Clock, waiter: Callable[..., ResponseWaiter]) -> None:
    with pytest.raises(TeacherError, match=r"after 30 s \(teacher.timeout_s\); last failure: MessageError: bad"):
        waiter(timeout_s=30.0).answer(PendingRequest(Sender(clock, (0.1, MessageError("bad")), (NEVER, ""))))


K, V = 3, 20
INFO = TeacherInfo(
    fingerprint="f", probe_digest="p", head_digest="h", dtype="float32", hidden_size=4, num_parameters=1, vocab_rows=V,
    num_shared=V, payload="topk", topk=K, bytes_per_token=1, transform=LogitTransform(), has_bias=False, dropped_mass=0.0,
    packing_error=None,
)  # fmt: skip
BATCH = Batch({"input_ids": torch.ones(1, 4, dtype=torch.int64)}, torch.arange(2), torch.arange(2), torch.zeros(2))


def payload(**values: Any) -> dict[str, torch.Tensor]:
    """An answer to BATCH."""
    return {
        "log_probs": torch.full((2, K), -2.0, dtype=torch.bfloat16),
        "ids": torch.tensor([[0, 4, 9], [1, 2, V - 1]], dtype=torch.int32),
        "log_tail": torch.full((2,), -3.0),
        "label_log_probs": torch.full((2,), -4.0),
    } | values


def answer(tensors: dict[str, torch.Tensor], flip: bool = False) -> ScoreResponse:
    packed = {name: pack(tensor.clone()) for name, tensor in tensors.items()}
    checksum = digest(packed)
    if flip:
        packed["log_tail"][2][3] ^= 1
    return ScoreResponse(packed, 0.1, "replica-7", checksum)


DAMAGED_ANSWERS = {
    "checksum": (answer(payload(), flip=True), "do not have the checksum"),
    "missing": (answer({"ids": payload()["ids"]}), "instead of log_probs"),
    "shape": (answer(payload(log_tail=torch.zeros(3))), "instead of log_probs"),
    "dtype": (answer(payload(log_tail=torch.zeros(2, dtype=torch.float64))), "instead of log_probs"),
    "finite": (answer(payload(log_tail=torch.tensor([float("nan"), 0.0]))), "log_tail .* not finite at 1 of 2"),
    "range": (answer(payload(ids=payload()["ids"] + 1)), f"do not ascend within 0 to {V - 1} at 1 of 2"),
    "order": (answer(payload(ids=payload()["ids"].flip(-1))), "do not ascend within"),
    "unreadable": (answer(payload())._replace(payload={"ids": ("float99", (2,), None)}), "unknown dtype"),
    "nothing": (answer(payload())._replace(payload=None), "must have names"),
}


@pytest.fixture
def sent() -> list[ScoreRequest]:
    """All requests that a client sent, copies, too."""
    return []


@pytest.fixture
def pool(
    clock: Clock, said: list[str], sent: list[ScoreRequest], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., PoolTeacher]:
    """A client of a pool that gives each request the answers of one list, in the list's order."""
    monkeypatch.setattr(client, "keep_lease", lambda _: lambda: None)
    monkeypatch.setattr(client, "require_lease", lambda _: None)

    def connect(*plans: list[ScoreResponse], **options: Any) -> PoolTeacher:
        waiting = [Sender(clock, *((0.0, answer) for answer in plan)) for plan in plans]
        by_id: dict[str, Sender] = {}

        def send(request: ScoreRequest, request_id: str) -> Response:
            sent.append(request)
            if request_id not in by_id:
                by_id[request_id] = waiting.pop(0)
            return by_id[request_id](request_id)

        class Handle:
            class score:
                remote = staticmethod(send)

            class info:
                remote = staticmethod(lambda: Response(clock, 0.0, INFO))

        monkeypatch.setattr(client.serve, "get_app_handle", lambda _: Handle)
        return PoolTeacher("pool", TeacherConfig(model="t"), said.append, **options)

    return connect


@pytest.mark.parametrize("kind", DAMAGED_ANSWERS)
def test_a_damaged_answer_is_asked_for_again(kind: str, pool: Callable[..., PoolTeacher], said: list[str]) -> None:
    damaged, _ = DAMAGED_ANSWERS[kind]
    other = answer(payload(log_tail=torch.full((2,), -7.0)))
    teacher = pool([damaged, answer(payload())], [other])
    first, second = teacher.submit(BATCH), teacher.submit(BATCH)
    torch.testing.assert_close(teacher.collect(first).tensors, payload(), rtol=0, atol=0)
    assert teacher.collect(second).tensors["log_tail"].tolist() == [-7.0, -7.0]
    teacher.close()
    assert len(said) == 1 and said[0].startswith("the teacher pool sent a damaged answer (")
    assert said[0].endswith("(sent by replica replica-7)); asking again")


@pytest.mark.parametrize("kind", DAMAGED_ANSWERS)
def test_three_damaged_answers_are_an_error(kind: str, pool: Callable[..., PoolTeacher], said: list[str]) -> None:
    damaged, text = DAMAGED_ANSWERS[kind]
    teacher = pool([damaged] * 3)
    with pytest.raises(
        TeacherError, match=rf"{text}.* \(sent by replica replica-7\); the teacher pool was asked 3 times"
    ):
        teacher.collect(teacher.submit(BATCH))
    teacher.close()
    assert len(said) == 2


def test_images_are_read_once_and_sent_in_order(
    pool: Callable[..., PoolTeacher], sent: list[ScoreRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[Any] = []
    monkeypatch.setattr(client.ray, "put", lambda value: put.append(value) or len(put))

    def read(image: ImageRef) -> bytes:
        if image.digest == "gone":
            raise DataError("the image is missing")
        return image.digest.encode()

    def seeing(*digests: str) -> Batch:
        images = tuple(ImageRef(digest, at, 1, 4, 3, "memory:") for at, digest in enumerate(digests))
        return replace(BATCH, images=(images,))

    damaged = answer(payload(log_tail=torch.zeros(3)))
    teacher = pool([damaged, answer(payload())], [answer(payload())], [answer(payload())], read=read)
    requests = [teacher.submit(batch) for batch in (seeing("a", "b", "a"), seeing("gone"), BATCH, seeing("c"))]
    teacher.collect(requests[0])
    with pytest.raises(DataError, match="is missing"):
        teacher.collect(requests[1])
    for request in requests[2:]:
        teacher.collect(request)
    teacher.close()
    assert [{name: bytes(data) for name, data in found.items()} for found in put] == [
        {"a": b"a", "b": b"b"},
        {"c": b"c"},
    ]
    assert sorted((request.contents or 0, len(request.images)) for request in sent) == [(0, 0), (1, 1), (1, 1), (2, 1)]


def test_a_request_survives_the_wire_and_damage_to_any_part_is_noticed() -> None:
    inputs, positions, labels = ScoreRequest.of(BATCH).unpacked()
    assert torch.equal(inputs["input_ids"], BATCH.inputs["input_ids"])
    assert torch.equal(positions, BATCH.loss_positions) and torch.equal(labels, BATCH.labels)
    for part, name in (("inputs", "input_ids"), ("targets", "loss_positions"), ("targets", "labels")):
        request = ScoreRequest.of(BATCH)
        dtype, shape, data = getattr(request, part)[name]
        damaged = data.copy()
        damaged[0] ^= 4
        getattr(request, part)[name] = (dtype, shape, damaged)
        with pytest.raises(MessageError, match="checksum"):
            request.unpacked()


def test_images_of_a_request_are_covered_by_its_checksum_and_their_bytes_by_their_digests() -> None:
    content = b"a picture"
    name = xxhash.xxh3_128_hexdigest(content)
    batch = replace(BATCH, images=((ImageRef(name, 0, 1, 4, 3, "file:a.png"),),))
    request = ScoreRequest.of(batch, "a reference")
    request.unpacked()
    assert ScoreRequest.of(BATCH).checksum != request.checksum
    for damaged in ((), (tuple(replace(image, start=1) for image in batch.images[0]),), 7):
        with pytest.raises(MessageError, match="checksum"):
            request._replace(images=damaged).unpacked()
    sent = contents_of({name: content})
    assert request.checked_contents(sent | {"another": sent[name]}) == {name: content}
    for arrived in ({}, {name: sent[name][1:]}, {name: sent[name] ^ 1}):
        with pytest.raises(MessageError, match=f"the image {name} arrived damaged"):
            request.checked_contents(arrived)


def test_a_request_without_images_has_the_checksum_that_it_always_had() -> None:
    samples = [Sample([5, 6, 7, 8], [False, True, True, False]), Sample([9, 10, 11], [False, False, True])]
    assert ScoreRequest.of(collate(to_rows(samples, 16, True))).checksum == "0726224e0cb8b7e0"


def test_one_client_of_a_run_keeps_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is one process: it must not hear from every worker."""
    kept, asked = [], []
    monkeypatch.setattr(client, "keep_lease", lambda name: kept.append(name) or kept.clear)
    monkeypatch.setattr(client, "require_lease", asked.append)
    monkeypatch.setattr(client.serve, "get_app_handle", lambda _: None)
    others = [PoolTeacher("pool", TeacherConfig(model="t"), world=World(rank, 4)) for rank in range(1, 4)]
    assert not kept and asked == ["pool"] * 3
    main = PoolTeacher("pool", TeacherConfig(model="t"), world=World(0, 4))
    assert kept == ["pool"]
    for teacher in (*others, main):
        teacher.close()
    assert not kept
