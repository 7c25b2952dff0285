"""Followers in the driver that pass the lines of metrics.jsonl and validation.jsonl on to trackers, as these files grow.

So no training step ever waits for a tracker, credentials stay with the driver, and what did not arrive (the network was
away) is still in the files and is sent later.
"""

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taid_ray.config.schema import DistillConfig, stored_config
from taid_ray.config.text import read_tree
from taid_ray.errors import ConfigError
from taid_ray.files import write_json
from taid_ray.run.directory import RunManifest
from taid_ray.run.layout import CONFIG_FILE, METRICS_FILE, SEARCH_FILE, SUMMARY_FILE
from taid_ray.run.live import search_of
from taid_ray.run.log import DRIVER, Speaker
from taid_ray.tracking.sinks import TENSORBOARD, MLflow, Outcome, TensorBoard, Tracker, WeightsAndBiases
from taid_ray.tracking.tail import MetricsTail

POLL_S = 2.0
AGAIN_S = 30.0
"""Pause before the next try after a failure."""
CLOSE_S, STOPPED_CLOSE_S = 120.0, 20.0
"""Time that the end of a run waits for its trackers, and that of a run that is stopped, which may be killed soon."""


class Follower:
    """Keeps one tracker up to date, in a thread of its own."""

    def __init__(self, name: str, run_dir: Path, begin: Callable[[], Tracker], speaker: Speaker):
        self.name, self._begin, self._speaker = name, begin, speaker
        self._tail = MetricsTail(run_dir)
        self._tracker: Tracker | None = None
        self._over = threading.Event()
        self._outcome: Outcome = "failed"
        self._thread = threading.Thread(target=self._follow, name=f"taid-{name}", daemon=True)
        self.missing: str | None = None
        """What did not arrive, and why; None if everything did."""

    def open(self) -> Tracker:
        """Opens the tracker. Raises what its library raises if it cannot be reached."""
        self._tracker = self._begin()
        self._tail.begin(self._tracker.known)
        return self._tracker

    def start(self) -> None:
        """Begins to follow."""
        self._thread.start()

    def end(self, outcome: Outcome) -> None:
        """Begins to send what is left, and then to close the tracker. Returns at once."""
        self._outcome = outcome
        self._over.set()

    def wait(self, deadline: float, patience_s: float) -> None:
        """Waits until what `end` began is done, or time.monotonic() is the deadline, which is patience_s after `end`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.missing = f"it did not take everything within {patience_s:.0f} s"
        if self.missing:
            self._say(f"{self.name}: {self.missing}; {METRICS_FILE} has all figures")

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._over.wait(AGAIN_S if self.missing else POLL_S)
            try:
                self._send_new()
                if last and self._tracker is not None:
                    self._tracker.close(self._outcome)
            except Exception as error:  # of any library; it must not end a run
                self._failed(error)
            else:
                self._arrived()

    def _send_new(self) -> None:
        restarted = self._tail.restarted()
        if self._tracker is None or (restarted and self._tracker.rewrites_history):
            old, self._tracker = self._tracker, None
            if old is not None:
                old.close("stopped")
            self.open()
        assert self._tracker is not None
        more = True
        while more:
            points = self._tail.peek()
            if points:
                self._tracker.send(points)
            more = self._tail.commit()

    def _failed(self, error: Exception) -> None:
        first = self.missing is None
        since = f"what follows step {max(0, self._tail.step)} has not arrived"
        self.missing = f"{since} ({type(error).__name__}: {first_line(error)})"
        if first:
            self._say(f"{self.name}: {self.missing}; the run goes on, and it is tried again every {AGAIN_S:.0f} s")

    def _arrived(self) -> None:
        if self.missing is not None:
            self.missing = None
            self._say(f"{self.name}: everything has arrived again")

    def _say(self, message: str) -> None:
        self._speaker.say(message, DRIVER, logging.WARNING)


class Tracking:
    """The trackers of a run, closed together however the run ends."""

    def __init__(self, followers: list[Follower], run_dir: Path):
        self._followers, self._run_dir = followers, run_dir
        self._closed = False

    def add(self, follower: Follower) -> None:
        """Takes the follower of an open tracker, which from here on is closed with the others."""
        self._followers.append(follower)

    def finished(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Closes the trackers of a complete run. Returns its summary with what did not arrive, also in summary.json."""
        self.close("finished")
        missing = {follower.name: follower.missing for follower in self._followers if follower.missing}
        if missing:
            summary = summary | {"not_tracked": missing}
            write_json(self._run_dir / SUMMARY_FILE, summary)
        return summary

    def close(self, outcome: Outcome) -> None:
        """Closes all trackers, side by side; does nothing the second time."""
        if not self._closed:
            self._closed = True
            for follower in self._followers:
                follower.end(outcome)
            patience_s = STOPPED_CLOSE_S if outcome == "stopped" else CLOSE_S
            deadline = time.monotonic() + patience_s
            for follower in self._followers:  # all of them have been closing meanwhile
                follower.wait(deadline, patience_s)


@contextmanager
def tracking_session(config: DistillConfig, run: str, resumed: bool, speaker: Speaker) -> Iterator[Tracking]:
    """Passes the figures of a run on until it ends.

    Raises ConfigError if W&B or MLflow refuses a new run. A resumed one goes on without it meanwhile.
    """
    search = search_of(config.run_dir)
    group = str(read_tree(search / SEARCH_FILE)["id"]) if search else None
    wanted: dict[str, Callable[[], Tracker]] = {TENSORBOARD: lambda: TensorBoard(config.run_dir / TENSORBOARD)}
    if (project := config.tracking.wandb) is not None:
        wanted["wandb"] = lambda: WeightsAndBiases(project, run, config, group)
    if (experiment := config.tracking.mlflow) is not None:
        wanted["mlflow"] = lambda: MLflow(experiment, run, config, group)
    followers = [Follower(name, config.run_dir, begin, speaker) for name, begin in wanted.items()]
    tracking = Tracking([], config.run_dir)
    try:
        for follower in followers:
            if follower.name != TENSORBOARD:
                _open(follower, resumed, speaker)
            follower.start()
            tracking.add(follower)
        yield tracking
    except Exception:
        tracking.close("failed")
        raise
    except BaseException:  # Ctrl-C or SIGTERM
        tracking.close("stopped")
        raise
    tracking.close("finished")


def tell_stopped(run_dir: Path, speaker: Speaker) -> None:
    """Passes on the rest of a run whose process was killed, and that it was stopped."""
    config = stored_config(read_tree(run_dir / CONFIG_FILE))
    with tracking_session(config, RunManifest(config).id, True, speaker) as tracking:
        tracking.close("stopped")


def _open(follower: Follower, resumed: bool, speaker: Speaker) -> None:
    name = follower.name
    speaker.say(f"connecting to {name}")
    try:
        tracker = follower.open()
    except Exception as error:
        if resumed:
            return  # the follower will say so, and try again
        raise ConfigError(
            f"tracking.{name}: {name} refused the run ({type(error).__name__}: {first_line(error)}); put that right (its own "
            f"environment variables say where it is and who you are), or remove tracking.{name}"
        ) from error
    if address := getattr(tracker, "address", ""):
        speaker.say(f"{name}: {address}")


def check_installed(config: DistillConfig) -> None:
    """Raises ConfigError if a package that `tracking` needs is not there."""
    for name in ("wandb", "mlflow"):
        if getattr(config.tracking, name) is not None and not _installed(name):
            raise ConfigError(
                f"tracking.{name}: the package {name} is not installed here; pip install 'taid-ray[{name}]', or remove the key"
            )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def _installed(name: str) -> bool:
    """True if a package is installed; a mere directory of that name, as W&B leaves where it worked, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
