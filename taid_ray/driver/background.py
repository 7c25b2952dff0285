"""Work that a thread of the driver repeats, and whose failures must end neither the thread nor the run."""

from collections.abc import Callable
from contextlib import suppress

from taid_ray.driver.progress import ProgressView


class Unbroken:
    """Repeated work: each kind of failure is reported once, and the work is tried again."""

    def __init__(self, what: str, view: ProgressView, expected: type[Exception] | tuple[type[Exception], ...] = ()):
        """expected: failures that pass by themselves, and that nobody needs to hear of."""
        self._what, self._view, self._expected = what, view, expected
        self._said: set[str] = set()

    def attempt(self, work: Callable[[], None]) -> bool:
        """Tries the work. Returns whether it succeeded."""
        try:
            work()
        except self._expected:
            return False
        except Exception as error:
            told, kind = f"{type(error).__name__}: {error}"[:300], type(error).__name__
            if kind not in self._said:
                self._said.add(kind)
                with suppress(Exception):  # a log disk that is full, say, which is what failed in the first place
                    self._view.say(f"{self._what} failed ({told}); the run goes on, and it is tried again")
            return False
        return True
