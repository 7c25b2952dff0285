import math
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_ray.config.objective import ScheduleConfig
from taid_ray.errors import NonFiniteLossError
from taid_ray.scheduler.aggregate import LossAggregator, LossSums, StaleReportError, StepResult
from taid_ray.scheduler.schedule import TAIDSchedule

STEPS, WORLD = 6, 3


def fresh(signal: Literal["cross_entropy", "kl"] = "cross_entropy") -> LossAggregator:
    """alpha and beta far from the defaults, so that t depends on every loss before it."""
    return LossAggregator(TAIDSchedule(ScheduleConfig(t_start=0.2, alpha=0.3, beta=0.5), 1000), signal)


def begun(world_size: int = WORLD, attempt: int = 1, signal: Literal["cross_entropy", "kl"] = "kl") -> LossAggregator:
    aggregator = fresh(signal)
    aggregator.begin(attempt, world_size, None)
    return aggregator


def sums(kl: float, tokens: int = 1, **others: Any) -> LossSums:
    return LossSums(**{"kl": kl, "entropy": 0.0, "sft": 0.0, "tokens": tokens} | others)


def step(aggregator: LossAggregator, number: int, kls: list[float], attempt: int = 1) -> StepResult:
    answers = [aggregator.report(attempt, number, rank, sums(kl)) for rank, kl in enumerate(kls)]
    assert answers[:-1] == [None] * (len(kls) - 1)
    assert answers[-1] is not None
    return answers[-1]


def test_global_means_by_hand() -> None:
    aggregator = begun(2, signal="cross_entropy")
    assert aggregator.report(1, 1, 1, LossSums(1.0, 2.0, 4.0, 1, 0.5, 100, images=2, image_bytes=70)) is None
    result = aggregator.report(1, 1, 0, LossSums(5.0, 7.0, 8.0, 5, 0.25, 20, images=1, image_bytes=5))
    assert result is not None
    assert (result.step, result.kl, result.entropy, result.sft, result.tokens) == (1, 1.0, 1.5, 2.0, 6)
    assert (result.teacher_wait_s, result.payload_bytes) == (0.5, 120)
    assert (result.images, result.image_bytes) == (3, 75)
    assert result.schedule.prev_loss == 2.5  # cross-entropy form: kl + entropy, without sft
    assert result.schedule.t == 0.2


@pytest.mark.parametrize("signal, expected", [("kl", 3.0), ("cross_entropy", 10.0)])
def test_signal(signal: Any, expected: float) -> None:
    result = begun(1, signal=signal).report(1, 1, 0, sums(6.0, 2, entropy=14.0, sft=100.0))
    assert result is not None and result.schedule.prev_loss == expected


def test_ranks_without_tokens_take_part() -> None:
    aggregator = begun(2)
    assert aggregator.report(1, 1, 0, sums(0.0, 0)) is None
    result = aggregator.report(1, 1, 1, sums(3.0, 2))
    assert result is not None and (result.kl, result.tokens) == (1.5, 2)


# Magnitudes so far apart that adding in another order gives other bits.
spread = st.floats(-1e3, 1e3).map(lambda x: math.copysign(10 ** (abs(x) / 100), x))
rank_sums = st.builds(LossSums, spread, spread, spread, st.integers(1, 10**6), st.floats(0, 9), st.integers(0, 10**9))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(rank_sums, min_size=2, max_size=7))
def test_the_order_of_arrival_does_not_matter(data: st.DataObject, reports: list[LossSums]) -> None:
    result = None
    aggregator = begun(len(reports))
    for rank in data.draw(st.permutations(range(len(reports)))):
        assert result is None
        result = aggregator.report(1, 1, rank, reports[rank])
    assert result is not None
    tokens = sum(r.tokens for r in reports)
    assert result.tokens == tokens
    assert result.kl == sum(r.kl for r in reports) / tokens  # the exact bits of the sum in rank order
    assert result.entropy == sum(r.entropy for r in reports) / tokens
    assert result.sft == sum(r.sft for r in reports) / tokens


def test_one_update_per_step() -> None:
    aggregator = begun()
    alone = TAIDSchedule(ScheduleConfig(t_start=0.2, alpha=0.3, beta=0.5), 1000)
    for number in range(1, STEPS + 1):
        result = step(aggregator, number, [3.0 / number] * WORLD)
        alone.update(result.kl)
        assert result.schedule == alone.state
        assert result.schedule.step == result.step == number
    assert result.schedule.t > 0.5


def test_repeated_reports_count_once() -> None:
    aggregator = begun(2)
    for _ in range(3):
        assert aggregator.report(1, 1, 0, sums(1.0)) is None
    first = aggregator.report(1, 1, 1, sums(3.0))
    assert first is not None and first.kl == 2.0 and first.tokens == 2
    for rank in (0, 1, 0):  # late ones: the answer again, no second update
        assert aggregator.report(1, 1, rank, sums(100.0)) == first
    assert aggregator.result == first and aggregator.schedule.state.step == 1
    assert step(aggregator, 2, [1.0, 1.0]).kl == 1.0  # nothing late leaked into the next step


@pytest.mark.parametrize("attempt, number", [(1, 3), (3, 3), (2, 1), (2, 4), (2, 0)])
def test_stale_and_impossible_reports_are_refused(attempt: int, number: int) -> None:
    aggregator = begun(1, attempt=2)
    for done in (1, 2):
        step(aggregator, done, [1.0], attempt=2)
    before = aggregator.result
    with pytest.raises(StaleReportError, match="refused"):
        aggregator.report(attempt, number, 0, sums(1.0))
    assert aggregator.result == before
    assert step(aggregator, 3, [1.0], attempt=2).step == 3


@pytest.mark.parametrize("attempt", [1, 2])
def test_only_a_newer_attempt_begins(attempt: int) -> None:
    aggregator = begun(attempt=2)
    with pytest.raises(StaleReportError, match="cannot begin"):
        aggregator.begin(attempt, 1, None)
    assert (aggregator.attempt, aggregator.world_size) == (2, WORLD)


def test_an_attempt_may_go_back_in_steps() -> None:
    aggregator = begun()
    results = [step(aggregator, n, [2.0**-n] * WORLD) for n in range(1, 6)]
    aggregator.begin(2, 2, results[1])
    assert aggregator.result == results[1] and aggregator.schedule.state == results[1].schedule
    again = [step(aggregator, n, [2.0**-n] * 2, attempt=2) for n in (3, 4, 5)]
    assert [r.schedule for r in again] == [r.schedule for r in results[2:]]
    with pytest.raises(StaleReportError):
        aggregator.report(1, 6, 0, sums(1.0))


def test_an_attempt_without_a_checkpoint_starts_from_the_beginning() -> None:
    aggregator = begun()
    results = [step(aggregator, n, [4.0 / n] * WORLD) for n in (1, 2, 3)]
    aggregator.begin(2, WORLD, None)
    assert (aggregator.result.step, aggregator.result.schedule.t) == (0, 0.2)
    assert [step(aggregator, n, [4.0 / n] * WORLD, attempt=2) for n in (1, 2, 3)] == results


@pytest.mark.parametrize("from_checkpoint", [True, False])
def test_an_attempt_forgets_the_reports_of_the_one_before(from_checkpoint: bool) -> None:
    aggregator = begun(2)
    start = aggregator.result
    aggregator.report(1, 1, 0, sums(1000.0))
    aggregator.begin(2, 2, start if from_checkpoint else None)
    assert aggregator.report(2, 1, 1, sums(1.0)) is None
    result = aggregator.report(2, 1, 0, sums(1.0))
    assert result is not None and result.kl == 1.0


def test_seed_newest_attempt_then_highest_step_wins() -> None:
    source = begun()
    start, *results = [source.result, *(step(source, n, [4.0 / n] * WORLD) for n in range(1, 5))]
    aggregator = fresh("kl")
    seen = []
    for attempt, result in [
        (5, results[2]),
        (5, results[1]),
        (4, results[3]),
        (5, results[3]),
        (6, start),
        (5, results[3]),
    ]:
        aggregator.seed(attempt, WORLD, result)
        seen.append((aggregator.attempt, aggregator.result.step))
        assert aggregator.schedule.state == aggregator.result.schedule
    assert seen == [(5, 3), (5, 3), (5, 3), (5, 4), (6, 0), (6, 0)]
    assert aggregator.world_size == WORLD


def test_seed_with_nothing_new_keeps_the_reports() -> None:
    aggregator = begun(2)
    aggregator.report(1, 1, 0, sums(1.0))
    aggregator.seed(1, 2, aggregator.result)
    assert aggregator.report(1, 1, 1, sums(3.0)) is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["kl", "entropy"])
def test_a_non_finite_loss_leaves_everything_untouched(bad: float, field: str) -> None:
    aggregator = begun(2, signal="cross_entropy")
    for number in (1, 2):
        step(aggregator, number, [4.0 / number, 1.0])
    result, state = aggregator.result, aggregator.schedule.state
    aggregator.report(1, 3, 0, sums(1.0))
    for _ in range(2):  # sent again, it is refused again
        with pytest.raises(NonFiniteLossError, match="step 3"):
            aggregator.report(1, 3, 1, sums(**{"kl": 1.0} | {field: bad}))
        assert aggregator.result is result and aggregator.schedule.state == state


class Run:
    """Ranks that follow the scheduler's protocol (SchedulerActor and SchedulerClient), with events in any order."""

    def __init__(self, losses: list[list[LossSums]]):
        self.losses, self.world = losses, len(losses[0])
        self.actor = begun(self.world)
        self.known = [self.actor.result] * self.world
        self.seen: list[list[StepResult]] = [[] for _ in losses[0]]
        self.inside: set[int] = set()
        """Ranks whose report the present actor has and has not answered."""

    def due(self, rank: int) -> int:
        return self.known[rank].step + 1

    def send(self, rank: int) -> None:
        """A report, for the first time or again; the reply is under way only."""
        if self.due(rank) <= len(self.losses):
            self.actor.seed(1, self.world, self.known[rank])
            self.actor.report(1, self.due(rank), rank, self.losses[self.due(rank) - 1][rank])
            self.inside.add(rank)

    def answer(self, rank: int) -> None:
        """The reply arrives, if there is one."""
        if rank in self.inside and self.actor.result.step >= self.due(rank):
            result = self.actor.report(1, self.due(rank), rank, self.losses[self.due(rank) - 1][rank])
            assert result is not None
            self.inside.discard(rank)
            self.known[rank] = result
            self.seen[rank].append(result)

    def heartbeat(self, rank: int) -> None:
        self.actor.seed(1, self.world, self.known[rank])

    def kill(self, rank: int) -> None:
        self.actor = fresh("kl")
        self.inside.clear()

    def finish(self) -> None:
        """Nothing dies any more: every rank keeps trying. Each round ends one step at least."""
        for _ in range(len(self.losses) + 1):
            for action in (self.heartbeat, self.send, self.answer):
                for rank in range(self.world):
                    action(rank)


actions = ["send"] * 6 + ["answer"] * 3 + ["heartbeat", "kill"]  # so that steps end, and not everybody hears of it
event = st.tuples(st.sampled_from(actions), st.integers(0, WORLD - 1))
positive = st.builds(LossSums, st.floats(1e-3, 1e3), st.floats(0, 10), st.just(0.0), st.integers(1, 999))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(positive, min_size=WORLD, max_size=WORLD), min_size=STEPS, max_size=STEPS),
    st.lists(event, min_size=60, max_size=60) | st.lists(event, max_size=60),
)
def test_killed_at_any_moment_every_rank_sees_the_same_bits(
    losses: list[list[LossSums]], events: list[tuple[str, int]]
) -> None:
    undisturbed, run = Run(losses), Run(losses)
    undisturbed.finish()
    for action, rank in events:
        getattr(run, action)(rank)
    run.finish()
    assert [result.step for result in undisturbed.seen[0]] == list(range(1, STEPS + 1))
    assert run.seen == undisturbed.seen  # dataclasses of floats: equal means the same values, t included
