"""Parts of a discrete-event simulation: a clock, signals to wait for, processes, links, queues and barriers.

A process is a generator that yields signals and goes on when each has happened. Times are seconds.
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from itertools import count


class Signal:
    """Something that happens once."""

    __slots__ = ("calls", "done")

    def __init__(self) -> None:
        self.done = False
        self.calls: list[Callable[[], None]] = []

    def fire(self) -> None:
        """Lets it happen: makes all `calls`, once."""
        self.done = True
        for call in self.calls:
            call()
        self.calls = []


Process = Generator[Signal, None, None]


class Clock:
    """Runs what is due, in the order of time and, at the same time, in the order in which it was planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._waiting = 0
        """Number of processes that wait for something that has not happened."""

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Plans a call."""
        heapq.heappush(self._due, (time, next(self._number), call))

    def after(self, seconds: float) -> Signal:
        """Returns a signal that happens so many seconds from now."""
        signal = Signal()
        self.at(self.now + seconds, signal.fire)
        return signal

    def start(self, process: Process) -> None:
        """Runs a process up to the first signal that has not happened, and from there when that happens."""
        for signal in process:
            if not signal.done:
                self._waiting += 1
                signal.calls.append(partial(self._go_on, process))
                return

    def run(self) -> None:
        """Runs until nothing is due.

        Raises RuntimeError if a process is left that waits for what will never happen.
        """
        while self._due:
            self.now, _, call = heapq.heappop(self._due)
            call()
        if self._waiting:
            raise RuntimeError(f"the simulation is at a deadlock: {self._waiting} processes wait after {self.now:g} s")

    def _go_on(self, process: Process) -> None:
        self._waiting -= 1
        self.start(process)


class Link:
    """One direction of a process's network link, or a process that handles messages: one thing after another."""

    __slots__ = ("free",)

    def __init__(self) -> None:
        self.free = 0.0

    def carry(self, begin: float, seconds: float) -> float:
        """Returns when something that needs the link for `seconds`, from `begin` on at the earliest, has passed."""
        self.free = max(self.free, begin) + seconds
        return self.free


class Server:
    """Serves one at a time, in the order of arrival."""

    __slots__ = ("queue", "serving")

    def __init__(self) -> None:
        self.queue: deque[Signal] = deque()
        self.serving = False

    def __len__(self) -> int:
        """Returns how many are served or wait."""
        return len(self.queue) + self.serving

    def turn(self) -> Signal:
        """Returns a signal that happens when it is the caller's turn, who then calls `leave`."""
        signal = Signal()
        if self.serving:
            self.queue.append(signal)
        else:
            self.serving = signal.done = True
        return signal

    def leave(self) -> None:
        """Ends the turn of the one that is served; the next one follows."""
        if self.queue:
            self.queue.popleft().fire()
        else:
            self.serving = False


class Barrier:
    """Opens for everybody `seconds` after the last of `size` processes has arrived."""

    __slots__ = ("_clock", "_left", "_seconds", "held_up", "last", "opened")

    def __init__(self, clock: Clock, size: int, seconds: float):
        self._clock, self._left, self._seconds = clock, size, seconds
        self.opened = Signal()
        self.last = 0.0
        """When the last one arrived."""
        self.held_up: dict[str, float] = {}
        """Seconds that the last one had waited for something else, by reasons."""

    def arrive(self) -> Signal:
        """Counts one more process. Returns the signal of the opening."""
        self._left -= 1
        if self._left == 0:
            self.last = self._clock.now
            self._clock.at(self._clock.now + self._seconds, self.opened.fire)
        return self.opened
