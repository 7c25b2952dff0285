"""The workers' progress, passed on while they train: to the terminal, and to whoever is told of validations.

Figures come one way only, from the files that rank 0 writes in RUN. From the scheduler actor come the workers' notes, and
how far they are, by which the driver decides what a stop request may cost; neither waits for a shared file system.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from taid_ray.driver.background import Unbroken
from taid_ray.driver.progress import ProgressView
from taid_ray.run.log import STUDENT
from taid_ray.scheduler.owner import SchedulerOwner
from taid_ray.tracking.tail import TRAIN, MetricsTail

POLL_S = 0.5
END_S = 30.0
"""Limit for the end of a run to wait for whoever is told of its validations."""


@dataclass
class RunProgress:
    """The driver's knowledge of how far the workers are."""

    step: int = 0
    """The last step, of any attempt."""
    reporting: int = 0
    """The attempt whose workers reported a step last."""
    blind: bool = False
    """Whether the driver cannot hear of steps at present."""

    def may_have_steps(self, attempt: int) -> bool:
        """Tests whether the workers of `attempt` have made a step, or may have made one that the driver did not hear of."""
        return self.blind or self.reporting == attempt


@contextmanager
def progress_relay(
    scheduler: SchedulerOwner,
    run_dir: Path,
    total_steps: int,
    view: ProgressView,
    on_validation: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[RunProgress]:
    """Keeps what it yields up to date, and shows notes and figures of the workers on the terminal.

    on_validation: called, in a thread, with the line of each validation once, those of earlier attempts included; but for
    the one after the last step, which the summary has.
    """
    progress, over = RunProgress(), threading.Event()
    listener = _Listener(scheduler, progress, view)
    figures = _Figures(run_dir, total_steps, view, on_validation)
    hearing = Unbroken("listening to the workers", view, expected=RayError)  # the actor is being restarted
    showing = Unbroken("following the figures of the run", view)

    def relay() -> None:
        last = False
        while not last:
            last = over.wait(POLL_S)  # once more after the end, for what came last
            showing.attempt(figures.poll)  # first, because a note tells what follows the steps that are there
            progress.blind = not hearing.attempt(listener.poll)

    thread = threading.Thread(target=relay, name="taid-progress-relay", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        over.set()
        thread.join(END_S)
        if thread.is_alive():
            view.say(f"the relay of the workers' progress has not ended within {END_S:.0f} s; going on without it")


class _Listener:
    """Hears from the scheduler actor what the workers say, and how far they are."""

    def __init__(self, scheduler: SchedulerOwner, progress: RunProgress, view: ProgressView):
        self._scheduler, self._progress, self._view = scheduler, progress, view
        self._seen = 0

    def poll(self) -> None:
        news = self._scheduler.news(self._seen)
        self._progress.step = max(self._progress.step, news.step)
        self._progress.reporting = news.reporting or self._progress.reporting  # a restarted actor has forgotten it
        for note in news.notes:
            self._view.say(note, STUDENT)
            self._seen += 1


class _Figures:
    """Follows metrics.jsonl and validation.jsonl."""

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        view: ProgressView,
        on_validation: Callable[[dict[str, Any]], None] | None,
    ):
        self._tail, self._total_steps, self._view, self._tell = MetricsTail(run_dir), total_steps, view, on_validation
        self._tail.skip_steps()  # those of earlier drivers, which the workers may be about to make again
        self._told = -1

    def poll(self) -> None:
        self._tail.restarted()
        more = True
        while more:
            lines = self._tail.peek()
            if steps := [line for section, line in lines if section == TRAIN]:
                self._view.step(steps[-1], self._total_steps)
            for section, line in lines:
                if section != TRAIN and self._tell is not None and self._told < line["step"] < self._total_steps:
                    self._tell(line)
                    self._told = line["step"]
            more = self._tail.commit()
