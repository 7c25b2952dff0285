"""Reads from a run's directory what its steps took, for `taid-ray plan CONFIG --from RUN`."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from taid_ray.config.fields import SETS_RATES
from taid_ray.config.paths import flat, with_absolute_paths
from taid_ray.config.schema import DistillConfig, build_config, marks_of, same_meaning
from taid_ray.errors import ConfigError
from taid_ray.plan.hardware import Hardware
from taid_ray.plan.inputs import PlanInputs
from taid_ray.plan.rates import Rates, collectives, simulated_times
from taid_ray.report.history import History

WARM_UP, FEWEST, LATEST = 3, 5, 100
"""Steps that are left out at the begin of a run and when it was resumed, those that are needed, and the most that count, the
latest."""
OUTLIERS = 0.1
"""Share of these that are left out at either end, the fastest and the slowest."""
LARGEST_NOISE = 0.2
"""Scatter of a worker's steps that is believed; more comes from what else ran on the machine."""


@dataclass(frozen=True)
class RunFigures:
    """Rates and step times that a run's metrics tell. Seconds are means over `steps`, outliers left out."""

    path: Path
    inputs: PlanInputs
    """The run's own configuration, with the workers that it had."""
    steps: int
    step_s: float
    teacher_wait_s: float
    """The longest that any worker waited for the teacher in a step; 0 if it asks none."""
    schedule_wait_s: float
    mixed_starts: int
    """Number of times that the workers were started, if `steps` may be of several of them with other settings; else 0."""
    rates: dict[str, float]
    """Those fields of Rates that the run knows, in its own layout; assumed collectives are subtracted."""

    def applied(self, assumed: Rates, inputs: PlanInputs) -> Rates:
        """Returns the run's rates in the layout of `inputs`; what the run does not know stays as assumed.

        Micro-batches of another size take their time in proportion, and so does the optimizer with its parameters.
        """
        size = inputs.loss.tokens / self.inputs.loss.tokens
        share = inputs.workload.trained_per_worker / self.inputs.workload.trained_per_worker
        factors = dict.fromkeys(("teacher_s", "forward_s", "loss_s", "backward_s"), size) | {"optimizer_s": share}
        known = {name: rate * factors.get(name, 1.0) for name, rate in self.rates.items()}
        return replace(assumed, **(known | ({"teacher_s": 0.0} if inputs.mode == "cache" else {})))

    def replayed_s(self, assumed: Rates) -> float:
        """Returns the step time that a plan of the run's own layout has, to be compared with `step_s`."""
        return simulated_times(self.inputs, self.applied(assumed, self.inputs)).step_s

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures and the layout for JSON."""
        names = ("steps", "step_s", "teacher_wait_s", "schedule_wait_s", "rates")
        figures = {name: getattr(self, name) for name in names}
        return {"path": str(self.path), "workers": self.inputs.workers, "replicas": replicas_of(self.inputs)} | figures


def run_figures(history: History, inputs: PlanInputs) -> RunFigures:
    """Takes the rates out of a run's metrics. inputs: of the plan.

    Raises ConfigError if the run has other models or settings that change its rates, ran on other hardware, changed its
    number of workers, or has made too few steps since it was last resumed.
    """
    _check_same(history, inputs.config)
    _check_hardware(history, inputs.hardware)
    before, workers = _last_start(history)
    run = PlanInputs(
        build_config(history.config.model_dump(mode="json"), values={"student.workers": workers}),
        inputs.models,
        inputs.hardware,
        inputs.images,
    )
    # in the last steps of a finished run the teacher has no more to do
    ended = history.summary is not None and run.asks_teacher
    idle = math.ceil(run.config.given_teacher.window / run.accumulation) if ended else 0
    kept = slice((before or 0) + WARM_UP, max(0, history.steps - idle))
    step_s = history["step_s"][kept][-LATEST:]
    if len(step_s) < FEWEST:
        raise ConfigError(
            f"--from {history.path}: of its {history.steps} steps, {len(step_s)} are left without the first {kept.start}"
            + (f" (it was resumed after step {before}, maybe with other settings)" if before else "")
            + (f" and the last {idle}" if idle else "")
            + f", and at least {FEWEST} are needed; name a longer run"
        )
    cut = int(OUTLIERS * len(step_s))
    usual = np.sort(np.argsort(step_s)[cut : len(step_s) - cut])
    columns = {name: column[kept][-LATEST:][usual] for name, column in history.columns.items()}
    mean = {name: float(column.mean()) for name, column in columns.items()}
    return RunFigures(
        path=history.path,
        inputs=run,
        steps=len(usual),
        step_s=mean["step_s"],
        teacher_wait_s=mean.get("teacher_wait_s", 0.0),
        schedule_wait_s=mean["schedule_wait_s"],
        mixed_starts=len(history.attempts) if before is None and len(history.attempts) > 1 else 0,
        rates=_rates(columns, mean, run),
    )


def replicas_of(inputs: PlanInputs) -> str:
    """Names the replicas of a configuration: `2`, `1 to 4`, or where there are none the teacher's mode."""
    if inputs.mode != "pool":
        return inputs.mode
    replicas = inputs.config.given_teacher.replicas
    return str(replicas.min) if replicas.fixed else f"{replicas.min} to {replicas.max}"


def _rates(columns: dict[str, np.ndarray], mean: dict[str, float], run: PlanInputs) -> dict[str, float]:
    """Returns the fields of Rates that the metrics tell."""
    micro, between = run.accumulation, collectives(run, run.workers)
    own_s = sum(columns[f"{phase}_s"] for phase in ("forward", "loss", "backward", "optimizer"))
    rates = {
        # Phases of several workers contain what they send each other, which the plan counts by itself.
        "forward_s": max(0.0, mean["forward_s"] / micro - (between.gather_s or 0.0)),
        "loss_s": mean["loss_s"] / micro,
        "backward_s": max(0.0, mean["backward_s"] / micro - (between.reduce_s or 0.0)),
        "optimizer_s": max(0.0, mean["optimizer_s"] - (between.update_s or 0.0)),
        "data_s": mean["data_s"] / micro,
        "noise": min(float(np.std(np.log(own_s))), LARGEST_NOISE) if np.all(own_s) else 0.0,
    }
    if mean.get("teacher_compute_s") and not run.config.cache.on:  # a cache leaves only some requests to the teacher
        rates["teacher_s"] = mean["teacher_compute_s"] / run.workload.requests
    return rates


def _check_same(history: History, config: DistillConfig) -> None:
    """Raises ConfigError if the run differs from `config` in a key that sets its rates, or in the kind of device."""
    before, now = (flat(each.model_dump(mode="json")) for each in (history.config, with_absolute_paths(config)))
    changed = [
        f"{key} (there {json.dumps(before.get(key))}, here {json.dumps(now.get(key))})"
        for key in sorted(before.keys() | now.keys())
        if not same_meaning(key, before.get(key), now.get(key))
        and (SETS_RATES in marks_of(key) or (key == "device" and "auto" not in (before[key], now[key])))
    ]
    if changed:
        raise ConfigError(
            f"--from {history.path}: its steps say nothing about this configuration, because they differ in "
            f"{'; '.join(changed)}. Name a run with the same values, or plan without --from"
        )


def _check_hardware(history: History, hardware: Hardware) -> None:
    """Raises ConfigError where the run's key `device` names the other kind of hardware than --gpu."""
    device = history.config.device
    if device != "auto" and (device == "cpu") != hardware.is_cpu:
        right = "--gpu cpu" if device == "cpu" else "the GPU that it ran on"
        raise ConfigError(
            f"--from {history.path}: its device: {device} contradicts --gpu {hardware.name}; plan with {right}, or without "
            "--from"
        )


def _last_start(history: History) -> tuple[int | None, int]:
    """Returns how many steps the run had when its last driver took it up, and the student workers since then.

    The settings may have changed at that moment. The first value is None, and the second that of all starts, if run.json is
    of an older version, which does not have it. Raises ConfigError if the number of workers changed, or is not known.
    """
    if not history.attempts:
        raise ConfigError(
            f"--from {history.path}: its run.json names no start of workers, so their number is not known; name another run"
        )
    before = history.attempts[-1].get("steps_before")
    workers = [
        attempt["workers"] for attempt in history.attempts if before is None or attempt.get("steps_before") == before
    ]
    if len(set(workers)) > 1:
        raise ConfigError(
            f"--from {history.path}: its attempts had {', '.join(map(str, workers))} workers, and its metrics do not say which "
            "steps are whose; name a run whose number of workers did not change"
        )
    return before, workers[0]
