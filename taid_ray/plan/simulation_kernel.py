"""What a discrete-event simulation is made of: a clock, things to wait for, processes, shared processors, links, barriers.

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
        self.done = True
        for call in self.calls:
            call()
        self.calls = []


Process = Generator[Signal, None, None]


class Clock:
    """Runs what is due, in the order of time and, at the same time, of being planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._waiting = 0
        """Processes, for something that has not happened."""

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time, next(self._number), call))

    def after(self, seconds: float) -> Signal:
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
        """Until nothing is due. Raises RuntimeError if a process is left that waits for what will never happen."""
        while self._due:
            self.now, _, call = heapq.heappop(self._due)
            call()
        if self._waiting:
            raise RuntimeError(f"the simulation is at a deadlock: {self._waiting} processes wait after {self.now:g} s")

    def _go_on(self, process: Process) -> None:
        self._waiting -= 1
        self.start(process)


class Processors:
    """Of one host. Work beyond the number of cores makes all work slower alike, as an operating system shares time."""

    def __init__(self, clock: Clock, cores: float | None):
        """cores: None where everybody has a processor of its own."""
        self._clock, self._cores = clock, cores
        self._work: list[tuple[float, int, Signal]] = []
        self._number = count()
        self._served = 0.0
        """Seconds of work that each task present from the beginning would have been given."""
        self._since = 0.0
        self._plan = 0

    def work(self, seconds: float) -> Signal:
        """Happens when so much computing is done."""
        if self._cores is None:
            return self._clock.after(seconds)
        self._pass()
        signal = Signal()
        heapq.heappush(self._work, (self._served + seconds, next(self._number), signal))
        self._replan()
        return signal

    @property
    def _rate(self) -> float:
        assert self._cores is not None
        return min(1.0, self._cores / len(self._work)) if self._work else 1.0

    def _pass(self) -> None:
        self._served += (self._clock.now - self._since) * self._rate
        self._since = self._clock.now

    def _replan(self) -> None:
        self._plan += 1
        if self._work:
            plan, left = self._plan, max(0.0, self._work[0][0] - self._served)
            self._clock.at(self._clock.now + left / self._rate, lambda: self._finish(plan))

    def _finish(self, plan: int) -> None:
        if plan != self._plan:  # somebody came or went meanwhile
            return
        self._pass()
        self._served = max(self._served, self._work[0][0])  # rounding must not leave a rest that takes no time
        ready = []
        while self._work and self._work[0][0] <= self._served:
            ready.append(heapq.heappop(self._work)[2])
        self._replan()
        for signal in ready:
            signal.fire()


class Link:
    """One direction of somebody's network link; what is sent over it goes one after another."""

    __slots__ = ("free",)

    def __init__(self) -> None:
        self.free = 0.0

    def carry(self, begin: float, seconds: float) -> float:
        """When something that needs the link for so long is over it; it can begin at `begin`."""
        self.free = max(self.free, begin) + seconds
        return self.free


class Server:
    """Serves one at a time, in the order of arrival."""

    __slots__ = ("queue", "serving")

    def __init__(self) -> None:
        self.queue: deque[Signal] = deque()
        self.serving = False

    def __len__(self) -> int:
        """Who is here."""
        return len(self.queue) + self.serving

    def turn(self) -> Signal:
        """Happens when it is the caller's turn, who then calls `leave`."""
        signal = Signal()
        if self.serving:
            self.queue.append(signal)
        else:
            self.serving = signal.done = True
        return signal

    def leave(self) -> None:
        if self.queue:
            self.queue.popleft().fire()
        else:
            self.serving = False


class Barrier:
    """Over for everybody so many seconds after the last of `size` came."""

    __slots__ = ("_clock", "_left", "_seconds", "cause", "last", "over")

    def __init__(self, clock: Clock, size: int, seconds: float):
        self._clock, self._left, self._seconds = clock, size, seconds
        self.over = Signal()
        self.last = 0.0
        """When the last one came."""
        self.cause: dict[str, float] = {}
        """What made it late, by reasons, as it says itself."""

    def arrive(self) -> Signal:
        self._left -= 1
        if self._left == 0:
            self.last = self._clock.now
            self._clock.at(self._clock.now + self._seconds, self.over.fire)
        return self.over
