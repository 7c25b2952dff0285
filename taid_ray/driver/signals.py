"""Ctrl-C and SIGTERM, taken as a wish to stop; and work in a thread, so that the main thread hears them meanwhile."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

POLL_S = 0.5
ATTEMPT_THREAD = "taid-attempt"
"""Name of the thread that `run_in_thread` starts."""


@dataclass
class StopRequest:
    """Somebody's wish that the run stops: after its step, with a checkpoint, or, said twice, at once."""

    cause: int = 0
    """The signal that was first: SIGINT or SIGTERM."""
    times: int = 0
    """How often somebody wished it."""

    def request(self, cause: int) -> None:
        """Records a request; the second one means at once. cause: SIGINT or SIGTERM."""
        self.cause = self.cause or cause
        self.times += 1

    @property
    def requested(self) -> bool:
        """True if somebody wants the run to stop."""
        return self.times > 0

    @property
    def at_once(self) -> bool:
        """True if nobody wants to wait for a checkpoint."""
        return self.times > 1

    def end(self) -> BaseException:
        """The exception that the driver ends with."""
        return KeyboardInterrupt() if self.cause == signal.SIGINT else SystemExit(128 + self.cause)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Takes Ctrl-C and SIGTERM as requests to stop, which `AttemptLoop` fulfils.

    Signals arrive in the main thread only; in any other one nothing is ever requested.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        stop.request(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_in_thread(work: Callable[[], Any], poll: Callable[[], None]) -> Any:
    """The result of `work`, which runs in a thread, while this thread calls `poll` every POLL_S and hears signals."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # handed over to the waiting thread
            done.set_exception(error)

    threading.Thread(target=run, name=ATTEMPT_THREAD, daemon=True).start()
    while True:
        try:
            return done.result(timeout=POLL_S)
        except TimeoutError:
            if done.done():
                raise
            poll()
