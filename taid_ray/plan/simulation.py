"""Simulates a run's pipeline event by event: student workers, teacher replicas and what they wait for.

It follows student.loop, student.prefetch and teacher.pool.replica: every worker keeps a window of requests at the replicas,
each of which computes one at a time; collectives and the scheduler let nobody go before the last worker has come.
"""

import gc
import math
from collections import deque

import numpy as np

from taid_ray.plan.pipeline import Pipeline, SimulatedStep
from taid_ray.plan.simulation_kernel import Barrier, Clock, Link, Process, Server, Signal


def simulate(pipeline: Pipeline) -> SimulatedStep:
    """Simulates a pipeline; deterministic for a seed. Takes seconds for some ten thousand requests."""
    collecting = gc.isenabled()
    gc.disable()  # there are no cycles to find among a million live objects, and looking takes most of the time
    try:
        return _Simulation(pipeline).result()
    finally:
        if collecting:
            gc.enable()


def _factors(rng: np.random.Generator, noise: float, shape: tuple[int, ...]) -> list[list[float]]:
    """Draws factors whose mean is 1, also where there are few of them."""
    drawn = rng.lognormal(0.0, noise, shape)
    found: list[list[float]] = (drawn / drawn.mean()).tolist()
    return found


class _Simulation:
    """The state that workers and replicas share."""

    def __init__(self, pipeline: Pipeline):
        p = self.p = pipeline
        self.clock = Clock()
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
        """When the last worker reported each step, and what had held it up."""
        self.barriers: dict[tuple[str, int], Barrier] = {}
        self.done = np.zeros((self.total, p.workers))
        self.waits = dict.fromkeys(("teacher", "data", "collectives", "others", "schedule"), 0.0)
        self.worker_busy = 0.0

    def result(self) -> SimulatedStep:
        """Runs the simulation."""
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
        """Follows one request: to a replica, through its queue, and back over both links."""
        p = self.p
        if not self.replicas:
            answer.fire()
            return
        yield self.clock.after(p.request_s)
        # Serve looks at two replicas and takes the one with less to do.
        chosen = min(self.choices[rank][number], key=lambda index: len(self.replicas[index]))
        if p.replicas == 2:
            chosen = min((0, 1), key=lambda index: len(self.replicas[index]))
        replica = self.replicas[chosen]
        yield replica.turn()
        yield self.clock.after(p.teacher_s * self.asked[rank][number])
        replica.leave()
        yield self.clock.after(p.answer_s)
        carry = p.answer_bytes / p.link_bytes_per_s
        sent = self.out[chosen].carry(self.clock.now, carry)
        yield self.clock.after(sent - self.clock.now)
        # Both links work at the same time; the receiver's may be busy with other answers.
        arrived = self.into[rank].carry(self.clock.now - carry, carry)
        yield self.clock.after(max(0.0, arrived - self.clock.now) + p.latency_s)
        answer.fire()

    def report(self, step: int) -> Process:
        """Follows a worker's report to the scheduler actor, which handles one after another beside heartbeats and polls."""
        yield self.clock.after(self.p.latency_s)
        handling = self.p.report_s / (1 - self.p.background_share)
        yield self.clock.after(self.scheduler.carry(self.clock.now, handling) - self.clock.now)
        self.results[step].arrive()

    def barrier(self, what: str, number: int, seconds: float) -> Barrier:
        """Returns the barrier that all workers meet at, made by the first of them."""
        key = what, number
        if key not in self.barriers:
            self.barriers[key] = Barrier(self.clock, self.p.workers, seconds)
        return self.barriers[key]


class _Worker:
    """One student worker's loop."""

    def __init__(self, simulation: _Simulation, rank: int):
        self.simulation, self.p, self.rank = simulation, simulation.p, rank
        self.answers: deque[Signal] = deque()
        self.sent = 0
        self.read = [Signal() for _ in range(simulation.read_steps)]
        self.needed = [Signal() for _ in range(simulation.read_steps)]
        self.counted = False
        """Whether the step is past the warm-up."""
        self.held_up = {"teacher": 0.0, "data": 0.0}
        """Seconds that this worker has waited since all workers last met."""

    def run(self) -> Process:
        """Makes all steps."""
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
                    sim.reported[step] = sim.clock.now, dict(self.held_up)
                    sim.clock.start(sim.report(step))
                yield self._compute(p.backward_s * factor)
                yield from self._meet("reduce", number, p.reduce_s)
            yield self._compute(p.optimizer_s * factor)
            yield from self._meet("update", step, p.update_s)
            begin = sim.clock.now
            yield sim.results[step].opened
            self._count_meeting("schedule", begin, *sim.reported[step])
            sim.done[step, self.rank] = sim.clock.now

    def _read(self) -> Process:
        """Reads ahead of what was sent, as the thread of student.prefetch.read_ahead does; not of the step that is computed, or
        a window that spans more steps than it reads ahead would never be full."""
        ahead = self.p.read_ahead_steps
        for step, read in enumerate(self.read):
            if step > ahead:
                yield self.needed[step - ahead - 1]
            if self.p.read_s:
                yield self.simulation.clock.after(self.p.read_s)
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
        return self.simulation.clock.after(seconds)

    def _wait(self, signal: Signal, what: str) -> Process:
        """Waits for something that is this worker's alone."""
        begin = self.simulation.clock.now
        yield signal
        seconds = self.simulation.clock.now - begin
        self.held_up[what] += seconds
        self._count(what, seconds)

    def _meet(self, what: str, number: int, seconds: float | None) -> Process:
        """Takes part in a collective of so many seconds; None: there is none."""
        if seconds is None or self.p.workers == 1:
            return
        begin, barrier = self.simulation.clock.now, self.simulation.barrier(what, number, seconds)
        barrier.held_up = dict(self.held_up)  # of the last one, in the end
        yield barrier.arrive()
        self._count_meeting("collectives", begin, barrier.last, barrier.held_up)

    def _count_meeting(self, what: str, begin: float, last: float, held_up: dict[str, float]) -> None:
        """Counts a wait since `begin` for all workers: until the last one came for what had held that one up, for as long as
        that had, else for `others`; from then on for `what`."""
        late = max(0.0, last - begin)
        self._count(what, self.simulation.clock.now - max(begin, last))
        for reason, seconds in held_up.items():
            part = min(late, seconds)
            self._count(reason, part)
            late -= part
        self._count("others", late)
        self.held_up = dict.fromkeys(self.held_up, 0.0)

    def _count(self, what: str, seconds: float) -> None:
        if self.counted:
            self.simulation.waits[what] += seconds
