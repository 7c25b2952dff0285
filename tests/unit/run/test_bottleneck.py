import pytest

from taid_ray.run.bottleneck import Usage, balanced_replicas, verdict


def usage(wall: float, wait: float, compute: float, payload_bytes: int = 100 * 2**20) -> Usage:
    """The same figures from ten equal steps."""
    total = Usage()
    for _ in range(10):
        total.add(wall / 10, wait / 10, compute / 10, payload_bytes // 10)
    return total


@pytest.mark.parametrize(
    "wall, wait, compute, replicas, kind, balanced",
    [
        (100, 1, 60, 1, "student-bound", 1),
        (100, 0, 60, 4, "student-bound", 1),  # too many
        (100, 50, 98, 1, "teacher-bound", 2),  # 98 s of work into the student's own 50 s
        (100, 75, 199, 2, "teacher-bound", 8),
        (100, 40, 20, 1, "wire-bound", 1),  # the replica is idle, and yet the student waits
        (100, 2, 170, 2, "student-bound", 2),
    ],
)
def test_verdict(wall: float, wait: float, compute: float, replicas: int, kind: str, balanced: int) -> None:
    found = usage(wall, wait, compute)
    assert verdict(found, replicas).startswith(kind + ": ")
    assert balanced_replicas(found) == balanced


def test_what_is_said() -> None:
    assert verdict(usage(100, 0.5, 35), 2) == (
        "student-bound: the student waits 0.5% of the time, 2 replicas are 18% busy; 1 would do"
    )
    assert verdict(usage(100, 50, 98), 1) == (
        "teacher-bound: the student waits 50.0% of the time, 1 replica is 98% busy; 2 replicas would balance it"
    )
    assert "answers arrive late at 1 MiB/s" in verdict(usage(100, 40, 20), 1)


def test_a_busy_pool_is_always_advised_to_grow() -> None:
    """Waiting with full replicas needs at least one more, even where the sums say that they just suffice."""
    assert "2 replicas would balance it" in verdict(usage(100, 5, 80), 1)


def test_balance_moves_a_run_to_student_bound() -> None:
    """With the advised number the teacher's work fits into the student's own time."""
    for wait in (10.0, 30.0, 60.0, 90.0):
        found = usage(100, wait, 99)
        assert found.teacher_compute_s / balanced_replicas(found) <= found.wall_s - found.teacher_wait_s
