"""What is simulated, and what comes out."""

from dataclasses import dataclass

WAITED = 0.03
"""run.bottleneck.WAITING: the share of a step below which a wait is not worth a word."""


@dataclass(frozen=True)
class Pipeline:
    """What one run consists of. Times are seconds of one processor that does nothing else."""

    workers: int
    replicas: int
    """0: the teacher computes in the worker itself (teacher_s), or there is none (teacher_s = 0)."""
    micro_batches: int
    """Of each worker in one optimizer step."""
    forward_s: float
    """Of one micro-batch, the loss included."""
    backward_s: float
    optimizer_s: float
    teacher_s: float
    """Of one request."""
    window: int = 4
    """Requests that a worker keeps in flight."""
    read_s: float = 0.0
    """Reading and encoding the rows of one GLOBAL batch, which every worker does in a thread of its own."""
    data_s: float = 0.0
    """Making and sending one request."""
    request_s: float = 0.0
    """Between sending a request and its computation, and ..."""
    answer_s: float = 0.0
    """... between that and having the answer: packing, copying, checking."""
    answer_bytes: float = 0.0
    link_bytes_per_s: float = float("inf")
    """Of every process, in each direction."""
    latency_s: float = 0.0
    gather_s: float | None = None
    """Collective before every forward pass (ZeRO-3); None: there is none."""
    reduce_s: float | None = None
    """Collective with every backward pass (ZeRO-2 and 3)."""
    update_s: float | None = None
    """Collective with the optimizer step."""
    report_s: float = 0.0
    """The scheduler's work for one worker's report."""
    noise: float = 0.0
    """Standard deviation of the logarithm of a worker's time in one step, and of a replica's for one request."""
    cores: float | None = None
    """Of the one host that everything shares; None: everybody has a processor of its own."""
    steps: int = 10
    warm_up: int = 4
    """Steps that are simulated first and not counted."""
    seed: int = 0


@dataclass(frozen=True)
class SimulatedStep:
    step_s: float
    """Mean, by the last worker."""
    waits: dict[str, float]
    """Seconds of a step that a worker stands still, mean over all: for `teacher`, `data`, `collectives`, `schedule`, and
    `others` that are slower. Waiting for somebody who waited for the teacher is waiting for the teacher."""
    worker_busy_s: float
    """Seconds of all workers' own computation in the whole simulation, their local teacher included."""

    @property
    def waits_for(self) -> str:
        """The wait that costs most; `student` where none costs much."""
        name, seconds = max(self.waits.items(), key=lambda item: item[1])
        return name if seconds > WAITED * self.step_s else "student"


def collective_s(count: float, parties: int, bytes_per_s: float, latency_s: float, passes: int = 2) -> float:
    """Of a ring that moves `count` bytes; passes: 2 for an all-reduce, 1 for a reduce-scatter or an all-gather.

    Libraries take trees where a large ring's hops would cost more than its bytes, hence the logarithm.
    """
    if parties == 1:
        return 0.0
    hops = min(parties - 1, 2 * (parties - 1).bit_length())
    return passes * ((parties - 1) / parties * count / bytes_per_s + hops * latency_s)
