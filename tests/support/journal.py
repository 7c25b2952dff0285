"""Waiting for what another thread does, and not for time."""

import threading
from collections.abc import Callable
from typing import Any

WITHIN_S = 60.0
"""A guard against hanging, on a machine as busy as can be."""


class Journal(list[Any]):
    """A list whose growth can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._grown = threading.Condition()

    def append(self, entry: Any) -> None:
        self.extend([entry])

    def extend(self, entries: Any) -> None:
        with self._grown:
            super().extend(entries)
            self._grown.notify_all()

    def __iadd__(self, entries: Any) -> "Journal":
        self.extend(entries)
        return self

    def wait(self, enough: Callable[["Journal"], bool]) -> None:
        """Returns once there is enough in it."""
        with self._grown:
            assert self._grown.wait_for(lambda: enough(self), WITHIN_S), f"it did not happen; so far: {self}"

    def wait_for(self, entry: Any) -> None:
        self.wait(lambda journal: entry in journal)

    def wait_length(self, count: int) -> None:
        self.wait(lambda journal: len(journal) >= count)
