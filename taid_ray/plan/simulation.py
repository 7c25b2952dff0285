"""A run's pipeline as a discrete-event simulation: student workers, teacher replicas and what they wait for.

It follows student.loop, student.prefetch and teacher.pool.replica: every worker keeps a window of requests at the replicas,
each of which computes one at a time; gradients and the scheduler let nobody go before the last worker has come.
"""

import gc
import math
from collections import deque

import numpy as np

from taid_ray.plan.pipeline import Pipeline, SimulatedStep
from taid_ray.plan.simulation_kernel import Barrier, Clock, Link, Process, Processors, Server, Signal

READ_AHEAD_STEPS = 8
"""student.worker.READ_AHEAD_STEPS, which is not imported here because that takes seconds."""


def simulate(pipeline: Pipeline) -> SimulatedStep:
    """Deterministic for a seed. Seconds for some ten thousand requests."""
    collecting = gc.isenabled()
    gc.disable()  # there are no cycles to find among a million live objects, and looking takes most of the time
    try:
        return _Simulation(pipeline).result()
    finally:
        if collecting:
            gc.enable()


def _factors(rng: np.random.Generator, noise: float, shape: tuple[int, ...]) -> list[list[float]]:
    """Of mean 1, also where there are few of them."""
    drawn = rng.lognormal(0.0, noise, shape)
    found: list[list[float]] = (drawn / drawn.mean()).tolist()
    return found


class _Simulation:
    """All workers and replicas at work."""

    def __init__(self, pipeline: Pipeline):
        p = self.p = pipeline
        self.clock = Clock()
        self.host = Processors(self.clock, p.cores)
        self.total = p.warm_up + p.steps
        # As in the middle of a long run: the requests of the steps that would follow are sent, too.
        self.read_steps = self.total + math.ceil(p.window / p.micro_batches)
        self.requests = self.read_steps * p.micro_batches
        rng = np.random.default_rng(p.seed)
        self.own = _factors(rng, p.noise, (p.workers, self.total))
        self.asked = _factors(rng, p.noise, (p.workers, self.requests))
        self.replicas = [Server() for _ in range(p.replicas)]
        self.out = [Link() for _ in range(p.replicas)]
        self.into = [Link() for _ in range(p.workers)]
        choices = rng.integers(0, max(1, p.replicas), (p.workers, self.requests, 2))
        self.choices: list[list[list[int]]] = choices.tolist()
        self.results = [Barrier(self.clock, p.workers, p.latency_s) for _ in range(self.total)]
        self.scheduler = Link()
        self.reported: dict[int, tuple[float, dict[str, float]]] = {}
        """Of each step: when the last report left, and what its sender had waited for."""
        self.barriers: dict[tuple[str, int], Barrier] = {}
        self.done = np.zeros((self.total, p.workers))
        self.waits = dict.fromkeys(("teacher", "data", "collectives", "others", "schedule"), 0.0)
        self.worker_busy = 0.0

    def result(self) -> SimulatedStep:
        p = self.p
        for rank in range(p.workers):
            self.clock.start(_Worker(self, rank).run())
        self.clock.run()
        ends = self.done.max(1)
        begin = ends[p.warm_up - 1] if p.warm_up else 0.0
        step_s = float(ends[-1] - begin) / p.steps
        waits = {name: seconds / p.workers / p.steps for name, seconds in self.waits.items()}
        return SimulatedStep(step_s, waits, self.worker_busy)

    def ask(self, rank: int, number: int, answer: Signal) -> Process:
        """One request on its way: to a replica, through its queue, and back over both links."""
        p = self.p
        if not self.replicas:
            answer.fire()
            return
        yield self.host.work(p.request_s)
        # Serve looks at two replicas and takes the one with less to do.
        chosen = min(self.choices[rank][number], key=lambda index: len(self.replicas[index]))
        if p.replicas == 2:
            chosen = min((0, 1), key=lambda index: len(self.replicas[index]))
        replica = self.replicas[chosen]
        yield replica.turn()
        yield self.host.work(p.teacher_s * self.asked[rank][number])
        replica.leave()
        yield self.host.work(p.answer_s)
        carry = p.answer_bytes / p.link_bytes_per_s
        sent = self.out[chosen].carry(self.clock.now, carry)
        yield self.clock.after(sent - self.clock.now)
        # Both links work at the same time; the receiver's may be busy with other answers.
        arrived = self.into[rank].carry(self.clock.now - carry, carry)
        yield self.clock.after(max(0.0, arrived - self.clock.now) + p.latency_s)
        answer.fire()

    def report(self, step: int) -> Process:
        """A worker's report on its way to the scheduler, which handles one after another."""
        yield self.clock.after(self.p.latency_s)
        yield self.clock.after(self.scheduler.carry(self.clock.now, self.p.report_s) - self.clock.now)
        self.results[step].arrive()

    def barrier(self, what: str, number: int, seconds: float) -> Barrier:
        key = what, number
        if key not in self.barriers:
            self.barriers[key] = Barrier(self.clock, self.p.workers, seconds)
        return self.barriers[key]


class _Worker:
    def __init__(self, simulation: _Simulation, rank: int):
        self.simulation, self.p, self.rank = simulation, simulation.p, rank
        self.answers: deque[Signal] = deque()
        self.sent = 0
        self.read = [Signal() for _ in range(simulation.read_steps)]
        self.needed = [Signal() for _ in range(simulation.read_steps)]
        self.counted = False
        self.lately = {"teacher": 0.0, "data": 0.0}
        """Waits since everybody last met."""

    def run(self) -> Process:
        sim, p = self.simulation, self.p
        sim.clock.start(self._read())
        yield from self._fill()
        for step in range(sim.total):
            self.counted = step >= p.warm_up
            factor = sim.own[self.rank][step]
            for micro in range(p.micro_batches):
                number = step * p.micro_batches + micro
                yield from self._wait(self.answers.popleft(), "teacher")
                yield from self._fill()
                yield from self._meet("gather", number, p.gather_s)
                local = 0.0 if p.replicas else p.teacher_s * sim.asked[self.rank][number]
                yield self._compute(local + p.forward_s * factor)
                if micro == p.micro_batches - 1:
                    sim.reported[step] = sim.clock.now, dict(self.lately)
                    sim.clock.start(sim.report(step))
                yield self._compute(p.backward_s * factor)
                yield from self._meet("reduce", number, p.reduce_s)
            yield self._compute(p.optimizer_s * factor)
            yield from self._meet("update", step, p.update_s)
            begin = sim.clock.now
            yield sim.results[step].over
            left, cause = sim.reported[step]
            self._blame("schedule", begin, left, cause)
            sim.done[step, self.rank] = sim.clock.now

    def _read(self) -> Process:
        """The thread that reads ahead: of what was sent, as student.prefetch.read_ahead does, not of the step that is computed. A
        window that spans more steps than it reads ahead would never be full."""
        for step, read in enumerate(self.read):
            if step > READ_AHEAD_STEPS:
                yield self.needed[step - READ_AHEAD_STEPS - 1]
            if self.p.read_s:
                yield self.simulation.host.work(self.p.read_s)
            read.fire()

    def _fill(self) -> Process:
        """Sends what the window has room for."""
        while len(self.answers) < self.p.window and self.sent < self.simulation.requests:
            number, answer = self.sent, Signal()
            self.sent += 1
            step = number // self.p.micro_batches
            self.needed[step].fire()
            yield from self._wait(self.read[step], "data")
            if self.p.data_s:
                yield self._compute(self.p.data_s)
            self.answers.append(answer)
            self.simulation.clock.start(self.simulation.ask(self.rank, number, answer))

    def _compute(self, seconds: float) -> Signal:
        self.simulation.worker_busy += seconds
        return self.simulation.host.work(seconds)

    def _wait(self, signal: Signal, what: str) -> Process:
        begin = self.simulation.clock.now
        yield signal
        seconds = self.simulation.clock.now - begin
        self.lately[what] += seconds
        self._count(what, seconds)

    def _meet(self, what: str, number: int, seconds: float | None) -> Process:
        if seconds is None or self.p.workers == 1:
            return
        begin, barrier = self.simulation.clock.now, self.simulation.barrier(what, number, seconds)
        barrier.cause = dict(self.lately)  # of the last one, in the end
        yield barrier.arrive()
        self._blame("collectives", begin, barrier.last, barrier.cause)

    def _blame(self, what: str, begin: float, last: float, cause: dict[str, float]) -> None:
        """Counts a wait that began at `begin` for something that the last one came to at `last`, having waited itself."""
        late = max(0.0, last - begin)
        self._count(what, self.simulation.clock.now - max(begin, last))
        for reason, seconds in cause.items():
            part = min(late, seconds)
            self._count(reason, part)
            late -= part
        self._count("others", late)
        self.lately = dict.fromkeys(self.lately, 0.0)

    def _count(self, what: str, seconds: float) -> None:
        if self.counted:
            self.simulation.waits[what] += seconds
