"""Notes on a run, in plain sentences: what moved t, what the steps waited for, how often workers were started again."""

import numpy as np

from taid_ray.config.objective import ScheduleConfig
from taid_ray.report.history import History
from taid_ray.run.bottleneck import Usage, verdict
from taid_ray.scheduler.schedule import adaptive_is_linear, sigmoid

ALMOST_HALF = 0.01
"""Distance of sigmoid(m) from one half within which the loss has no visible influence on t."""
EARLY = 2
"""First steps, whose t is t_start by definition: the first loss has no other to be compared with."""


def run_notes(history: History) -> list[str]:
    """Sentences about a run, the most important ones first."""
    return [*_progress(history), *_schedule(history), *_bottleneck(history), *_attempts(history)]


def _progress(history: History) -> list[str]:
    if history.summary is not None:
        return []
    total = f" of {history.total_steps:,}" if history.total_steps else ""
    when = f"{history.written:%Y-%m-%d %H:%M} UTC"
    return [f"The run is not finished: {_steps(history.steps)}{total}, the last one written at {when}."]


def _schedule(history: History) -> list[str]:
    schedule, loss = history.config.schedule, history.config.loss.name
    if loss == "sft":
        evaluated = "; its teacher was asked in validations only" if history.config.teacher else ""
        return [f"The loss is sft, cross-entropy on the data's own tokens, which learns from no teacher{evaluated}."]
    if loss != "taid":
        return [f"The loss is {loss}, which compares with the teacher itself throughout: there is no t to move."]
    if schedule.mode == "constant":
        return [f"schedule.mode is constant: t stays {schedule.t_start:g}."]
    if schedule.mode == "linear":
        line = f"t follows the line from {schedule.t_start:g} to {schedule.t_end:g}"
        return [f"schedule.mode is linear: {line}, whatever the loss does.", _end_of_t(history)]
    if schedule.mode == "exponential":
        curve = f"t follows its curve from {schedule.t_start:g} with alpha {schedule.alpha:g}"
        return [
            f"schedule.mode is exponential: {curve}, whatever the loss does.",
            *_floor_share(history),
            _end_of_t(history),
        ]
    return [*_inactive(history), *_floor_share(history), *_sigmoid(history), _end_of_t(history)]


def _inactive(history: History) -> list[str]:
    """Says so if the adaptive part could not lift t above its linear floor in any case."""
    schedule, total = history.config.schedule, history.total_steps
    if total is None:
        return [
            "How many steps train.epochs makes is known once the run has ended; until then the linear floor cannot be drawn, "
            "nor be said whether t could leave it."
        ]
    start, end, gain = schedule.t_start, schedule.t_end, _gain(schedule)
    if start == end or not adaptive_is_linear(start, end, schedule.alpha, total, gain):
        return []
    most, factor = schedule.alpha * total * (1 - start) * sigmoid(gain), "/ 2" if not gain else "sigmoid(gain)"
    return [
        f"The adaptive part is inactive: alpha N (1 - t_start) {factor} = {most:.3g} is not above t_end - t_start = "
        f"{end - start:.3g}, so t stays on its linear floor, whatever the loss does. With {_steps(total)} it can leave it from "
        f"about schedule.alpha = {schedule.alpha * (end - start) / most:.2g} on."
        if most
        else "schedule.alpha is 0, so t stays on its linear floor, whatever the loss does."
    ]


def _floor_share(history: History) -> list[str]:
    """Counts the steps whose t the linear floor decided, and those that the schedule's own rule decided, until t was t_end."""
    reached = _reached(history)
    decided = history["floor_active"][EARLY:reached] > 0
    if not len(decided):
        return ["Too few steps to say what moved t."]
    of = f"of {_steps(len(decided))}{' until t was t_end' if reached else ''}"
    if decided.all():
        return [f"The linear floor decided t in all {of}: it was a straight line."]
    rule = "the exponential curve" if history.config.schedule.mode == "exponential" else "the adaptive rule"
    found = f"The linear floor decided t in {decided.sum():,} {of} ({decided.mean():.1%})"
    last = int(np.flatnonzero(~decided)[-1]) + EARLY + 1
    found += f", {rule} in the others, the last time in step {last:,}."
    floor = history.floor()
    if floor is None:
        return [found]
    lead = history["t"] - floor
    return [f"{found} t was {lead.max():.3f} above the floor at most, in step {int(lead.argmax()) + 1:,}."]


def _sigmoid(history: History) -> list[str]:
    """Says how far the loss moved t, in mode adaptive only, whose momentum is in the metrics."""
    momentum = history["momentum"][EARLY:]
    if history.config.schedule.mode != "adaptive" or not len(momentum) or history["floor_active"][EARLY:].all():
        return []
    low, high = sigmoid(float(momentum.min())), sigmoid(float(momentum.max()))
    span = f"sigmoid(m), through which the loss moves t, lay within {low:.4f} to {high:.4f}"
    if max(high - 0.5, 0.5 - low) > ALMOST_HALF:
        return [f"{span}."]
    return [
        f"{span}: t took a fixed curve, on which the loss had no influence that could be seen (see schedule.mode normalised)."
    ]


def _end_of_t(history: History) -> str:
    schedule, t = history.config.schedule, history["t"]
    if step := _reached(history):
        share = f" ({step / history.total_steps:.0%} of the run)" if history.total_steps else ""
        return f"t reached t_end = {schedule.t_end:g} in step {step:,}{share}."
    if history.summary is None:
        return f"t is {t[-1]:.3f} in step {history.steps:,}, on its way to t_end = {schedule.t_end:g}."
    why = (
        "; the line ends there, because the last step uses the value of two steps before"
        if history["floor_active"][-1]
        else ""
    )
    return f"t did not reach t_end = {schedule.t_end:g}: the last step used {t[-1]:.3f}{why}."


def _bottleneck(history: History) -> list[str]:
    """Says which side the steps waited for. The first step is left out: its answers could not be asked for in advance."""
    teacher = history.config.teacher
    if teacher is None or not history.config.learns_from_teacher:
        return []
    keys = ("step_s", "teacher_wait_s", "teacher_compute_s", "payload_bytes")
    step_s, wait_s, compute_s, payload = (float(history[key][1:].sum()) for key in keys)
    if not step_s:  # there was no other step
        return []
    if teacher.mode == "pool" and teacher.replicas.fixed:
        usage = Usage(history.steps - 1, step_s, wait_s, compute_s, int(payload))
        replicas = teacher.replicas.min
        return [f"After the first step, with teacher.replicas = {replicas}: {verdict(usage, replicas)}."]
    return [f"After the first step the student waited {wait_s / step_s:.1%} of the time for the teacher's answers."]


def _attempts(history: History) -> list[str]:
    again = len(history.attempts) - 1
    if again < 1:
        return []
    times = "once" if again == 1 else f"{again:,} times"
    began = ", ".join(str(attempt["began"])[:19].replace("T", " ") for attempt in history.attempts[1:6])
    more = f" and {again - 5:,} more" if again > 5 else ""
    return [
        f"The workers were started again {times} ({began}{more}, UTC): from the newest checkpoint, if there was one. At which "
        "step is not recorded. Steps that were repeated are here once, with the figures of the last time."
    ]


def _reached(history: History) -> int | None:
    """Number of the first step with t = t_end; None if there is none."""
    reached = np.flatnonzero(history["t"] >= history.config.schedule.t_end - 1e-9)
    return int(reached[0]) + 1 if len(reached) else None


def _gain(schedule: ScheduleConfig) -> float:
    return schedule.gain if schedule.mode == "normalised" else 0.0


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"
