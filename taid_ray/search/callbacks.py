"""Callbacks of Ray Tune in the driver of a search: they keep trials.json and tell the terminal."""

import shutil
import time
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import RenderableType
from rich.text import Text

from taid_ray.driver.progress import ProgressView
from taid_ray.driver.signals import StopRequest
from taid_ray.report.format import shown
from taid_ray.report.search_page import trials_table
from taid_ray.report.search_results import Search, read_search
from taid_ray.search.book import TrialBook
from taid_ray.search.trial import ERROR_SUFFIX

REFRESH_S = 2.0
MIN_ROWS, OTHER_LINES = 5, 8
"""Fewest rows of the live table, and lines around them on the terminal."""


class TrialsShown:
    """The state of all trials, read from their files every few seconds."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._search: Search | None = None
        self._read = -REFRESH_S
        self.begun = False

    def table(self) -> RenderableType:
        """The trials as a table that fits on the terminal."""
        search = self._newest()
        rows = max(MIN_ROWS, shutil.get_terminal_size().lines - OTHER_LINES)
        return trials_table(search, rows) if search else Text("")

    def activity(self) -> str:
        """The trials that run, in one line."""
        search = self._newest()
        running = [trial for trial in search.trials if trial.status == "running"] if search else []
        steps = (f"{trial.name} at step {trial.step} of {trial.total_steps or '?'}" for trial in running)
        return f"trials: {', '.join(steps)}" if running else "the next trial"

    def _newest(self) -> Search | None:
        if self.begun and time.monotonic() - self._read >= REFRESH_S:
            self._read = time.monotonic()
            self._search = read_search(self._directory, last_lines=True)
        return self._search


class Watcher(tune.Callback):
    """Records in the book what becomes of the trials, and tells the terminal."""

    def __init__(self, book: TrialBook, stop: StopRequest, view: ProgressView):
        self._book, self._stop, self._view = book, stop, view
        self._old = {name: status for status in ("finished", "stopped") for name in book.with_status(status)}

    def __reduce__(self) -> Any:
        """Ray Tune pickles all it is given, for a resumption that we do not use; terminals and locks cannot be."""
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = str(trial)
        if name in self._old:
            return
        self._book.mark(name, "running")
        values = ", ".join(f"{key} {shown(value)}" for key, value in trial.config.items())
        self._view.say(f"trial {name}: {values}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "cross_entropy" in result and str(trial) not in self._old:
            compared = f"KL {result['kl']:.4f}, " if "kl" in result else ""
            figures = f"validation {compared}cross-entropy {result['cross_entropy']:.4f}"
            self._view.say(f"trial {trial}: {figures} after step {result['step']}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = str(trial)
        if name in self._old:
            self._view.say(f"trial {name}: {self._old[name]} before")
        elif self._book.is_finished(name):
            self._book.mark(name, "finished")
            self._view.say(f"trial {name}: finished")
        elif self._stop.requested:
            self._book.mark(name, "waiting")
        else:
            self._book.mark(name, "stopped")
            self._view.say(f"trial {name}: stopped early, others are better")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = str(trial)
        left = self._book.run_dir(name).with_suffix(ERROR_SUFFIX)
        error = left.read_text(encoding="utf-8") if left.exists() else "its process died"
        self._book.mark(name, "failed", error)
        self._view.say(f"trial {name}: failed: {error}")

    def stopper(self) -> tune.Stopper:
        """Ends the search once a signal came and no trial runs any more."""
        book, stop = self._book, self._stop

        class Stopper(tune.Stopper):
            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return bool(stop.requested) and not book.with_status("running")

        return Stopper()
