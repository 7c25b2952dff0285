"""Ctrl-C and SIGTERM, taken as a wish to stop; and work in a thread, so that the main thread hears them meanwhile."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

POLL_S = 0.5


@dataclass
class StopRequest:
    """SIGINT and SIGTERM since the run began."""

    first: int = 0
    count: int = 0

    def end(self) -> BaseException:
        """What the driver ends with."""
        return KeyboardInterrupt() if self.first == signal.SIGINT else SystemExit(128 + self.first)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Takes Ctrl-C and SIGTERM as a wish to stop, which `run_attempts` fulfils; a second one as the wish to stop at once."""
    found = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return

    def note(number: int, frame: Any) -> None:
        found.first = found.first or number
        found.count += 1

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_in_thread(work: Callable[[], Any], look: Callable[[], None]) -> Any:
    """The result of `work`, which runs in a thread, so that this one can look around and hear signals meanwhile."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # handed over to the main thread
            done.set_exception(error)

    threading.Thread(target=run, name="taid-attempt", daemon=True).start()
    while True:
        try:
            return done.result(timeout=POLL_S)
        except TimeoutError:
            if done.done():
                raise
            look()
