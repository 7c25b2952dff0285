"""Prometheus metrics of a run, exported by Ray on every node: METRICS, each under the name `ray_taid_...`.

A figure costs some microseconds, nothing waits for the exporter, and nothing happens where there is none. Ray collects
from each process every 10 s. It forgets a gauge 20 s after it was set last, so gauges are set again and again while their
process lives, and disappear with it; counters stay as they were, one series per process, so add them up over processes.
"""

import threading
import weakref
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from taid_ray.names import POOL_PREFIX
from taid_ray.run.metrics import PHASES

STUDENT, TEACHER = "student", "teacher"
TAGS = ("run", "role")
REFRESH_S = 5.0
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)

METRICS: dict[str, tuple[type[Any], str]] = {
    "taid_step": (Gauge, "Optimizer steps made."),
    "taid_planned_steps": (Gauge, "Optimizer steps of the whole run."),
    "taid_t": (Gauge, "The interpolation t used in the last step."),
    "taid_loss_nats": (Gauge, "Loss of the last step, in its cross-entropy form, per loss position."),
    "taid_kl_nats": (Gauge, "Divergence of the last step, per loss position."),
    "taid_learning_rate": (Gauge, "Learning rate of the last step."),
    "taid_gradient_norm": (Gauge, "Gradient norm of the last step, before clipping."),
    "taid_tokens_per_second": (Gauge, "Loss positions per second in the last step, over all workers."),
    "taid_tokens": (Counter, "Loss positions trained on, over all workers."),
    "taid_payload_bytes": (Counter, "Bytes of the teacher's answers, over all workers."),
    "taid_image_bytes": (Counter, "Bytes of images that were sent to the teacher, over all workers."),
    "taid_step_seconds": (Histogram, "Duration of an optimizer step."),
    "taid_phase_seconds": (Counter, "Where the time of the steps went, by phase."),
    "taid_validation_cross_entropy_nats": (Gauge, "The student's cross-entropy at the last validation."),
    "taid_validation_kl_nats": (Gauge, "KL(teacher || student) at the last validation."),
    "taid_checkpoint_step": (Gauge, "Step of the newest checkpoint that is written, 0 if there is none."),
    "taid_restarts": (Gauge, "How often the student workers were started again."),
    "taid_requests_again": (Counter, "Requests to the teacher that were sent more than once, by reason."),
    "taid_teacher_requests": (Counter, "Requests a teacher replica has answered."),
    "taid_teacher_compute_seconds": (Counter, "Time a teacher replica has computed."),
    "taid_teacher_request_seconds": (Histogram, "Computation of one request at a teacher replica."),
    "taid_teacher_queue": (Gauge, "Requests at a teacher replica, computing or waiting, mean over a second."),
}
"""Kind and meaning. Ray adds `ray_` in front, and `_total` to counters."""
STEP_GAUGES = {
    "taid_step": "step",
    "taid_t": "t",
    "taid_loss_nats": "loss",
    "taid_kl_nats": "kl",
    "taid_learning_rate": "lr",
    "taid_gradient_norm": "grad_norm",
    "taid_tokens_per_second": "tokens_per_s",
}
"""Gauges of the last step, by what it is called in metrics.jsonl. A run whose loss asks no teacher lacks some."""
OWN_TAGS = {"taid_phase_seconds": "phase", "taid_requests_again": "reason"}


class Instruments:
    """The metrics of one process, under the tags of its run and role."""

    def __init__(self, run: str, role: str):
        self._tags = {"run": run, "role": role}
        self._made: dict[str, Any] = {}
        self._last: dict[str, float] = {}
        threading.Thread(target=_refresh, args=(weakref.ref(self),), name="taid-gauges", daemon=True).start()

    def set(self, name: str, value: float) -> None:
        """Sets a gauge."""
        self._last[name] = value
        self._metric(name).set(value, self._tags)

    def add(self, name: str, amount: float, own_tag: str | None = None) -> None:
        """Adds to a counter. own_tag: value of the tag that only this metric has."""
        if amount > 0:  # Ray refuses 0
            tags = self._tags if own_tag is None else self._tags | {OWN_TAGS[name]: own_tag}
            self._metric(name).inc(amount, tags)

    def observe(self, name: str, value: float) -> None:
        """Records one value of a histogram."""
        self._metric(name).observe(value, self._tags)

    def refresh(self) -> None:
        """Sets all gauges again."""
        for name, value in list(self._last.items()):
            self._metric(name).set(value, self._tags)

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            kind, description = METRICS[name]
            keys = TAGS + ((OWN_TAGS[name],) if name in OWN_TAGS else ())
            boundaries = {"boundaries": list(SECONDS)} if kind is Histogram else {}
            self._made[name] = kind(name, description, tag_keys=keys, **boundaries)
        return self._made[name]


def _refresh(instruments: "weakref.ref[Instruments]") -> None:
    over = threading.Event()
    while not over.wait(REFRESH_S):
        alive = instruments()
        if alive is None:
            return
        alive.refresh()
        del alive


class StudentGauges:
    """The metrics of the whole run, which rank 0 sets."""

    def __init__(self, run: str, planned_steps: int, restarts: int):
        self._own = Instruments(run, STUDENT)
        self._own.set("taid_planned_steps", planned_steps)
        self._own.set("taid_restarts", restarts)

    def step(self, line: Mapping[str, Any], checkpoint: int) -> None:
        """Sets what a step has changed. line: of metrics.jsonl. checkpoint: step of the newest one, 0 if there is none."""
        own = self._own
        for name, key in STEP_GAUGES.items():
            if key in line:
                own.set(name, line[key])
        own.set("taid_checkpoint_step", checkpoint)
        own.add("taid_tokens", line["tokens"])
        own.add("taid_payload_bytes", line.get("payload_bytes", 0))
        own.add("taid_image_bytes", line.get("image_bytes", 0))
        own.observe("taid_step_seconds", line["step_s"])
        for phase in PHASES:
            own.add("taid_phase_seconds", line.get(f"{phase}_s", 0.0), phase)

    def validation(self, cross_entropy: float, kl: float | None) -> None:
        """Sets the figures of a validation, nats per token. kl: None without a teacher."""
        self._own.set("taid_validation_cross_entropy_nats", cross_entropy)
        if kl is not None:
            self._own.set("taid_validation_kl_nats", kl)


def run_of_pool(app_name: str) -> str:
    """The run, or the search, that a teacher pool belongs to, by the name of its Serve application."""
    return app_name.removeprefix(POOL_PREFIX)
