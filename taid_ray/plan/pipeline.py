"""Input and output of the simulation: the pipeline of one run, and what a step of it costs."""

from dataclasses import dataclass

from taid_ray.run.bottleneck import WAITING


@dataclass(frozen=True)
class Pipeline:
    """One run as the simulation sees it. Times are seconds of one processor that does nothing else."""

    workers: int
    replicas: int
    """0: the teacher computes in the worker itself (teacher_s), or there is none (teacher_s = 0)."""
    micro_batches: int
    """Micro-batches of each worker in one optimizer step."""
    forward_s: float
    """One micro-batch's forward pass and loss."""
    backward_s: float
    """One micro-batch's backward pass."""
    optimizer_s: float
    teacher_s: float
    """The teacher's computation for one request."""
    read_ahead_steps: int
    """Global batches that a worker's thread reads ahead of those that were sent."""
    window: int = 4
    """Requests that a worker keeps in flight."""
    read_s: float = 0.0
    """Reading and encoding the rows of one GLOBAL batch, which every worker does in a thread of its own."""
    data_s: float = 0.0
    """Making and sending one request."""
    request_s: float = 0.0
    """Time between sending a request and its computation."""
    answer_s: float = 0.0
    """Time between that computation and having the answer: packing, copying, checking."""
    answer_bytes: float = 0.0
    link_bytes_per_s: float = float("inf")
    """Speed of every process's network link, in each direction."""
    latency_s: float = 0.0
    gather_s: float | None = None
    """Collective before every forward pass (ZeRO-3); None: there is none."""
    reduce_s: float | None = None
    """Collective with every backward pass (ZeRO-2 and 3); None: there is none."""
    update_s: float | None = None
    """Collective with the optimizer step; None: there is none."""
    report_s: float = 0.0
    """The scheduler actor's work for one worker's report; it handles one after another."""
    background_share: float = 0.0
    """Share of the scheduler actor's time that heartbeats and polls take from the reports."""
    noise: float = 0.0
    """Standard deviation of the logarithm of a worker's time in one step, and of a replica's for one request."""
    steps: int = 10
    warm_up: int = 4
    """Steps that are simulated first and not counted."""
    seed: int = 0


@dataclass(frozen=True)
class SimulatedStep:
    """Result of a simulation: the time of one optimizer step, and what workers wait for in it."""

    step_s: float
    """Mean seconds of a step, by the last worker."""
    waits: dict[str, float]
    """Seconds of a step that a worker stands still, mean over all: for `teacher`, `data`, `collectives`, `schedule`, and
    `others` that are slower. Waiting for somebody who waited for the teacher is waiting for the teacher."""
    worker_busy_s: float
    """Seconds of all workers' own computation in the whole simulation, their local teacher included."""

    @property
    def waits_for(self) -> str:
        """Name of the wait that costs most; `student` where none costs much."""
        name, seconds = max(self.waits.items(), key=lambda item: item[1])
        return name if seconds > WAITING * self.step_s else "student"


def collective_s(count: float, parties: int, bytes_per_s: float, latency_s: float, passes: int = 2) -> float:
    """Returns the seconds of a ring that moves `count` bytes; passes: 2 for an all-reduce, 1 for a reduce-scatter or an
    all-gather.

    Libraries take trees where a large ring's hops would cost more than its bytes, hence the logarithm.
    """
    if parties == 1:
        return 0.0
    hops = min(parties - 1, 2 * (parties - 1).bit_length())
    return passes * ((parties - 1) / parties * count / bytes_per_s + hops * latency_s)
