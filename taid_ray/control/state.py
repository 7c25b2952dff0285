"""The state of a run or search, as a table over what its files say."""

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["starting", "training", "searching", "finishing", "stopped", "failed", "dead", "finished"]
POLL_S = 0.5
"""Pause between two looks at a run from outside."""
WORKING: tuple[State, ...] = ("starting", "training", "searching")
"""States of a driver that can be asked to stop."""


@dataclass(frozen=True)
class Seen:
    """Evidence in the files of a run or search: of its driver, and of how far it came."""

    live: bool
    """True if there is a live.json."""
    death: str | None
    """Reason why the driver that wrote it counts as dead, see `run.live.death`; None if it lives."""
    begun: bool
    """True if a run has made a step, and a search has joined its cluster, since that driver began."""
    ended: dict[str, Any] | None
    """Content of ended.json: an end by a signal or an error."""
    locked: bool
    """True if a process of this host holds the directory's lock."""
    complete: bool
    """True if a run has its summary.json, and all trials of a search have ended."""
    search: bool = False
    given_up: bool = False
    """True for a trial that its search has stopped early, by killing its process."""


def state_of(seen: Seen) -> tuple[State, str | None]:
    """The state of a run or search, and why it does not go on, by the first line that fits:

    given up                             stopped
    a run with summary.json              finished
    live.json of a dead driver           dead
    live.json, a complete search         finishing
    live.json, not yet begun             starting
    live.json                            training, searching
    ended.json                           stopped, failed: as it says
    the lock, a complete search          finishing
    the lock                             starting
    a search: all trials ended, or not   finished, stopped
    otherwise                            dead
    """
    if seen.given_up:
        return "stopped", "its search stopped it early, others are better; nothing goes on with it"
    if seen.complete and not seen.search:
        return "finished", None
    if seen.live:
        if seen.death:
            return "dead", seen.death
        if seen.complete:
            return "finishing", None
        working: State = "searching" if seen.search else "training"
        return (working if seen.begun else "starting"), None
    if seen.ended:
        return ("stopped" if seen.ended["how"] == "stopped" else "failed"), seen.ended["error"]
    if seen.locked:
        return ("finishing" if seen.complete else "starting"), None
    if seen.search:
        return ("finished" if seen.complete else "stopped"), None
    return "dead", "its driver ended without saying why"
