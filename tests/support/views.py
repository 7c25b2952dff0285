"""A terminal for tests of the driver."""

import threading
from collections.abc import Callable
from typing import Any

WITHIN_S = 60.0


class View:
    """Keeps what is said; tells whoever waits for it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[int] = []
        self._changed = threading.Condition()

    def say(self, message: str, role: str = "driver") -> None:
        with self._changed:
            self.said.append(message)
            self._changed.notify_all()

    def step(self, metrics: dict[str, Any], total_steps: int) -> None:
        with self._changed:
            self.steps.append(metrics["step"])
            self._changed.notify_all()

    def wait_for(self, activity: str) -> None:
        pass

    def until(self, met: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(met, WITHIN_S), self.said
