"""Waiting for what another process does and cannot tell."""

import time
from collections.abc import Callable

POLL_S = 0.05
WAIT_S = 120.0
"""For what takes a second on a quiet machine."""
START_S = 240.0
"""For what Ray has to start processes for, which then load torch."""


def wait_until(condition: Callable[[], object], what: str | Callable[[], str], timeout_s: float = WAIT_S) -> float:
    """Returns after how many seconds the condition held. Fails after timeout_s with `what`, a text or what makes one."""
    start = time.monotonic()
    while not condition():
        waited = time.monotonic() - start
        if waited > timeout_s:
            raise AssertionError(f"not within {waited:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(POLL_S)
    return time.monotonic() - start
