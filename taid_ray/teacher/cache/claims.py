"""Who computes a sample that several clients of one teacher ask for at the same time.

Claims are advice. Where one is lost, or its holder dies, a sample is computed twice, and nothing else happens.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

CLAIM_S = 10.0
"""A claim that is not renewed ends after so long: its holder was killed."""
RENEW_S = 2.0


class ClaimRegistry(Protocol):
    """Where claims are made. holder: a name that no other client has."""

    def claim(self, holder: str, keys: Sequence[str]) -> list[bool]:
        """For each key, whether it is the holder's to compute. Also renews what the holder has. Takes little time."""

    def release(self, holder: str, keys: Sequence[str]) -> None:
        """They are computed, or will not be."""


class Claims:
    """The desk itself: in one process, for clients of many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._held: dict[str, tuple[str, float]] = {}
        self._swept = clock()

    def claim(self, holder: str, keys: Sequence[str]) -> list[bool]:
        now = self._clock()
        if now - self._swept > CLAIM_S:
            self._swept, self._held = now, {key: held for key, held in self._held.items() if held[1] > now}
        granted = []
        for key in keys:
            owner, until = self._held.get(key, (holder, now))
            granted.append(owner == holder or until <= now)
            if granted[-1]:
                self._held[key] = (holder, now + CLAIM_S)
        return granted

    def release(self, holder: str, keys: Sequence[str]) -> None:
        for key in keys:
            if self._held.get(key, ("", 0.0))[0] == holder:
                del self._held[key]


class NoClaims:
    """The desk of a teacher that no other process asks."""

    def claim(self, holder: str, keys: Sequence[str]) -> list[bool]:
        return [True] * len(keys)

    def release(self, holder: str, keys: Sequence[str]) -> None:
        pass
