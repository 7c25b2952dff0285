"""The workers' progress, passed on while they train: to the terminal, and to whoever is told of validations.

Figures come one way only, from the files that rank 0 writes in RUN. From the scheduler actor come the workers' notes, and
how far they are, by which the driver decides what a stop request may cost. A thread of its own hears that, so that neither a
slow shared file system nor whoever is told of validations can make the driver lose a checkpoint.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from taid_ray.driver.background import Unbroken
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.signals import POLL_S
from taid_ray.errors import RunError
from taid_ray.files import read_lines
from taid_ray.run.layout import METRICS_FILE, VALIDATION_FILE
from taid_ray.run.log import STUDENT
from taid_ray.scheduler.owner import SchedulerOwner

BLIND_S = 3.0
"""Time without an answer of the scheduler actor after which the driver cannot know what the workers do."""
END_S = 30.0
"""Limit for the end of a run to wait for whoever is told of its validations."""


@dataclass
class RunProgress:
    """The driver's knowledge of how far the workers are."""

    step: int = 0
    """The last step, of any attempt."""
    reporting: int = 0
    """The attempt whose workers reported a step last."""
    heard: float = field(default_factory=time.monotonic)
    """Time of the scheduler actor's last answer, by the monotonic clock; minus infinity once it fails to answer."""

    @property
    def blind(self) -> bool:
        """True if the driver cannot hear of steps at present."""
        return time.monotonic() - self.heard > BLIND_S

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
    progress, notes = RunProgress(), deque[str]()
    listener = _Listener(scheduler, progress, notes)
    figures = _Figures(run_dir, total_steps, view, on_validation)
    hearing = Unbroken("listening to the workers", view, expected=RayError)  # the actor is being restarted
    showing = Unbroken("following the figures of the run", view)
    telling = Unbroken("passing on the validations", view)

    def listen() -> None:
        if not hearing.attempt(listener.poll):
            progress.heard = float("-inf")

    def show() -> None:
        showing.attempt(figures.show)
        while notes:  # after the steps, because a note tells what follows those that are there
            view.say(notes.popleft(), STUDENT)
        telling.attempt(figures.tell)

    with _repeating(show, "taid-show", view), _repeating(listen, "taid-listen", view):
        yield progress


@contextmanager
def _repeating(work: Callable[[], None], name: str, view: ProgressView) -> Iterator[None]:
    """Does the work every POLL_S in a thread, and once more at the end, for what came last."""
    over = threading.Event()

    def repeat() -> None:
        last = False
        while not last:
            last = over.wait(POLL_S)
            work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(END_S)
        if thread.is_alive():
            view.say(f"the relay of the workers' progress has not ended within {END_S:.0f} s; going on without it")


class _Listener:
    """Hears from the scheduler actor what the workers say, and how far they are."""

    def __init__(self, scheduler: SchedulerOwner, progress: RunProgress, notes: deque[str]):
        """notes: takes the workers' notes."""
        self._scheduler, self._progress, self._notes = scheduler, progress, notes
        self._seen = 0

    def poll(self) -> None:
        """Asks once. Raises RayError while the actor is being restarted."""
        news = self._scheduler.news(self._seen)
        self._progress.step = max(self._progress.step, news.step)
        self._progress.reporting = news.reporting or self._progress.reporting  # a restarted actor has forgotten it
        self._progress.heard = time.monotonic()
        self._notes.extend(news.notes)
        self._seen += len(news.notes)


class _Figures:
    """Follows metrics.jsonl and validation.jsonl, which are opened anew each time: so NFS shows what was written last."""

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        view: ProgressView,
        on_validation: Callable[[dict[str, Any]], None] | None,
    ):
        self._metrics, self._validations = run_dir / METRICS_FILE, run_dir / VALIDATION_FILE
        self._total_steps, self._view, self._on_validation = total_steps, view, on_validation
        self._told = -1
        self._shown: list[dict[str, Any]] = []
        with suppress(OSError, RunError):  # `show` will say so
            # Not to be shown: a line of an earlier driver, whose workers may have gone further than their last checkpoint.
            self._shown = read_lines(self._metrics, 1)

    def show(self) -> None:
        """Shows the newest step if it is another one than the last time."""
        newest = read_lines(self._metrics, 1)
        if newest and newest != self._shown:
            self._view.step(newest[0], self._total_steps)
        self._shown = newest

    def tell(self) -> None:
        """Tells of the validations that are new."""
        if self._on_validation is not None:
            for line in read_lines(self._validations):
                if self._told < line["step"] < self._total_steps:
                    self._on_validation(line)
                    self._told = line["step"]
