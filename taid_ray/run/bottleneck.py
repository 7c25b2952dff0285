"""Diagnosis of what holds a run back, student, teacher or wire, and how many teacher replicas would balance it."""

import math
from dataclasses import dataclass

WAITING = 0.03
"""Share of the time the student may wait for the teacher and still count as the slower side."""
BUSY = 0.7
"""Share of the time from which replicas count as fully used; the rest is queueing and transport."""


@dataclass
class Usage:
    """Sums over some steps, in seconds."""

    steps: int = 0
    wall_s: float = 0.0
    teacher_wait_s: float = 0.0
    """Longest wait of any worker for the teacher, summed over the steps."""
    teacher_compute_s: float = 0.0
    """Seconds of computation of all replicas together."""
    payload_bytes: int = 0

    def add(self, step_s: float, teacher_wait_s: float, teacher_compute_s: float, payload_bytes: int) -> None:
        """Adds a step."""
        self.steps += 1
        self.wall_s += step_s
        self.teacher_wait_s += teacher_wait_s
        self.teacher_compute_s += teacher_compute_s
        self.payload_bytes += payload_bytes


def balanced_replicas(usage: Usage) -> int:
    """Replicas that finish the teacher's work in the time the student needs for its own."""
    student_s = max(usage.wall_s - usage.teacher_wait_s, 1e-9)
    return max(1, math.ceil(usage.teacher_compute_s / student_s))


def verdict(usage: Usage, replicas: int) -> str:
    """A sentence on which side the run waits for, by how much, and what would change that."""
    waiting = usage.teacher_wait_s / usage.wall_s
    busy = usage.teacher_compute_s / (replicas * usage.wall_s)
    balanced = balanced_replicas(usage)
    found = f"the student waits {waiting:.1%} of the time, {_replicas(replicas)} {busy:.0%} busy"
    if waiting <= WAITING:
        advice = f"; {balanced} would do" if balanced < replicas else ""
        return f"student-bound: {found}{advice}"
    if busy >= BUSY or balanced > replicas:
        return f"teacher-bound: {found}; {max(balanced, replicas + 1)} replicas would balance it"
    rate = usage.payload_bytes / usage.wall_s / 2**20
    return (
        f"wire-bound: {found}; answers arrive late at {rate:.0f} MiB/s: raise teacher.window, choose a smaller "
        "teacher.payload, or bring teacher and student closer together"
    )


def _replicas(count: int) -> str:
    return "1 replica is" if count == 1 else f"{count} replicas are"
