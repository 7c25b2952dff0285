"""State behind the TAID scheduler actor: one global loss per optimizer step, whatever the number of ranks.

Every rank reports its sums once per step. When the last one is in, the token-weighted global loss is formed in rank
order, the schedule moves once, and the result is the same for everybody. Nothing here knows Ray; the actor adds
transport, the single-process loop uses it as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from taid_ray.errors import AttemptError
from taid_ray.scheduler.schedule import ScheduleState, TAIDSchedule

GO_ON, SAVE, STOP = 0, 1, 2
"""Requests for what follows a step on every rank: the next step; a checkpoint first; a checkpoint and the attempt's end."""

HEARTBEAT_S = 5.0
"""A worker that has told the scheduler actor nothing for so long tells it the newest result it knows.

That serves an actor that died between two answers of one step, which Ray needs seconds to restart; more of them would only
take its time from the reports.
"""
BEATS_PER_S = 50
"""Heartbeats of all workers together, at most, because one process answers them."""


class SourceLoss(NamedTuple):
    """Figures of one source of training data in one optimizer step: sums, or means if they are of a StepResult."""

    kl: float
    entropy: float
    sft: float
    tokens: int
    """Loss positions of the source; without any, means are 0."""


@dataclass(frozen=True)
class LossSums:
    """One rank's sums over its loss positions of one optimizer step, all micro-batches together."""

    kl: float
    """The divergence, in nats."""
    entropy: float
    """The term that turns the divergence into its cross-entropy form (for TAID the entropy of p_t)."""
    sft: float
    """Cross-entropy on the labels; 0 where no labels are mixed in."""
    tokens: int
    teacher_wait_s: float = 0.0
    """Time this rank stood still for teacher outputs."""
    payload_bytes: int = 0
    teacher_compute_s: float = 0.0
    """Time the teacher computed for this rank."""
    request: int = GO_ON
    """The request of this rank to all of them, for after the step: GO_ON, SAVE or STOP."""
    sources: tuple[SourceLoss, ...] = ()
    """The same sums of each source of the training data, if there are several."""
    images: int = 0
    """Images in this rank's rows."""
    image_bytes: int = 0
    """Bytes of images that were sent to the teacher."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank: the schedule's state for the next step, and the global means of this one."""

    step: int
    """Finished optimizer steps."""
    schedule: ScheduleState
    """The schedule after this step; its `t` is the one to use next."""
    kl: float = 0.0
    entropy: float = 0.0
    sft: float = 0.0
    tokens: int = 0
    teacher_wait_s: float = 0.0
    """The longest of any rank."""
    payload_bytes: int = 0
    teacher_compute_s: float = 0.0
    request: int = GO_ON
    """The strongest request of any rank or the driver; all ranks obey it after the same step."""
    sources: tuple[SourceLoss, ...] = ()
    """The means of each source of the training data, if there are several. The schedule does not look at them."""
    images: int = 0
    image_bytes: int = 0


class StaleReportError(AttemptError):
    """Report of an attempt or a step that is over. Its sender belongs to a dead worker group and must end."""


class LossAggregator:
    """Collects the reports of one attempt at a time, and makes the result of a step from them once every rank has reported.

    A report is known by its attempt, step and rank: one that comes twice counts once, one of an attempt that is over is
    refused.
    """

    def __init__(self, schedule: TAIDSchedule, signal: Literal["cross_entropy", "kl"]):
        self.schedule = schedule
        self.signal = signal
        self.attempt = 0
        self.world_size = 0
        self.result = self._start = StepResult(0, schedule.state)
        self._reports: dict[int, LossSums] = {}
        self.requested = GO_ON
        """The driver's request for after the step that is under way."""

    def begin(self, attempt: int, world_size: int, result: StepResult | None) -> None:
        """Starts an attempt of `world_size` ranks after a checkpoint's `result`, or (None) at the first step.

        It may go back in steps. Raises StaleReportError for an attempt that is not newer than the one under way.
        """
        if attempt <= self.attempt:
            raise StaleReportError(f"attempt {attempt} cannot begin: attempt {self.attempt} already has")
        self.attempt, self.world_size, self.requested = attempt, world_size, GO_ON
        self._adopt(result or self._start)

    def seed(self, attempt: int, world_size: int, result: StepResult) -> None:
        """Takes over the newest result that a rank knows, which rebuilds the state after a restart of the actor.

        The newest attempt wins, within it the highest step. Older results are ignored: they carry nothing new.
        """
        if attempt > self.attempt or (attempt == self.attempt and result.step > self.result.step):
            self.attempt, self.world_size = attempt, world_size
            self._adopt(result)

    def report(self, attempt: int, step: int, rank: int, sums: LossSums) -> StepResult | None:
        """Takes rank's sums of optimizer step `step` (1-based). Returns the result once every rank has reported.

        Repeating a report is harmless. A report of the step just finished returns its result again.

        Raises:
            StaleReportError: for an older attempt, or a step further back.
            NonFiniteLossError: when the global loss is not finite; the schedule is untouched.
        """
        if attempt != self.attempt:
            raise StaleReportError(f"report of attempt {attempt} refused: attempt {self.attempt} is running")
        if step == self.result.step:
            return self.result
        if step != self.result.step + 1:
            raise StaleReportError(f"report of step {step} refused: step {self.result.step + 1} is due")
        self._reports[rank] = sums
        return self._finish(step) if len(self._reports) == self.world_size else None

    def _finish(self, step: int) -> StepResult:
        reports = [self._reports[rank] for rank in sorted(self._reports)]
        tokens = sum(r.tokens for r in reports)
        kl, entropy, sft = (
            sum(getattr(r, name) for r in reports) / max(tokens, 1) for name in ("kl", "entropy", "sft")
        )
        state = self.schedule.update(kl + entropy if self.signal == "cross_entropy" else kl)
        self._reports = {}
        self.result = StepResult(
            step,
            state,
            kl,
            entropy,
            sft,
            tokens,
            max(r.teacher_wait_s for r in reports),
            sum(r.payload_bytes for r in reports),
            sum(r.teacher_compute_s for r in reports),
            max(self.requested, *(r.request for r in reports)),
            tuple(map(_mean, zip(*(r.sources for r in reports), strict=True))),
            sum(r.images for r in reports),
            sum(r.image_bytes for r in reports),
        )
        return self.result

    def _adopt(self, result: StepResult) -> None:
        self.schedule.resume(result.schedule)
        self.result = result
        self._reports = {}


def _mean(sums: Sequence[SourceLoss]) -> SourceLoss:
    """The means of a source from the sums of all ranks."""
    kl, entropy, sft, tokens = (sum(values) for values in zip(*sums, strict=True))
    whole = max(tokens, 1)
    return SourceLoss(kl / whole, entropy / whole, sft / whole, int(tokens))
