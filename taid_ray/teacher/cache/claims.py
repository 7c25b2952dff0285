"""Claims: which of several clients of one teacher computes a sample that all of them need.

A claim is advice. If one is lost, or its holder dies, a sample is computed twice, and nothing else happens.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

CLAIM_S = 10.0
"""Seconds after which a claim ends that was not renewed, because its holder was killed."""
RENEW_S = 2.0
"""Seconds between two renewals."""


class ClaimRegistry(Protocol):
    """The interface of what grants claims. holder: a name that no other client has."""

    def claim(self, holder: str, keys: Sequence[str]) -> list[bool]:
        """Claims samples by their keys, and renews the claims that the holder has. Answers at once.

        Returns for each key whether the holder has to compute it.
        """

    def release(self, holder: str, keys: Sequence[str]) -> None:
        """Ends the holder's claims to these keys: the samples were computed, or will not be."""


class Claims:
    """Grants each sample to one holder at a time. Lives in one process, and serves clients in many."""

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
    """Grants everything: for a teacher that no other process uses."""

    def claim(self, holder: str, keys: Sequence[str]) -> list[bool]:
        return [True] * len(keys)

    def release(self, holder: str, keys: Sequence[str]) -> None:
        pass
