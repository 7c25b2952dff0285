from unittest.mock import MagicMock

import pytest

from taid_ray.errors import TeacherError
from taid_ray.teacher.cache.claims import CLAIM_S, Claims, NoClaims


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_sample_is_granted_to_one_holder_at_a_time() -> None:
    claims = Claims(Clock())
    assert claims.claim("a", ["1", "2"]) == [True, True]
    assert claims.claim("b", ["2", "3"]) == [False, True]
    assert claims.claim("a", ["1", "2", "3"]) == [True, True, False]
    claims.release("a", ["2"])
    assert claims.claim("b", ["1", "2"]) == [False, True]
    assert claims.claim("a", ["2"]) == [False]


def test_only_the_holder_releases() -> None:
    claims = Claims(Clock())
    claims.claim("a", ["1"])
    claims.release("b", ["1", "never claimed"])
    assert claims.claim("b", ["1"]) == [False]


def test_what_is_not_renewed_ends() -> None:
    clock = Clock()
    claims = Claims(clock)
    claims.claim("a", ["1", "2"])
    clock.now += CLAIM_S - 1
    claims.claim("a", ["1"])
    clock.now += 2
    assert claims.claim("b", ["1", "2"]) == [False, True]
    claims.release("a", ["1", "2"])  # late, as after a long pause: the second one is another's now
    assert claims.claim("c", ["1", "2"]) == [True, False]


def test_what_the_killed_held_is_forgotten() -> None:
    clock = Clock()
    claims = Claims(clock)
    for number in range(1000):
        claims.claim("a", [str(number)])
    clock.now += 2 * CLAIM_S
    claims.claim("b", ["x"])
    assert list(claims._held) == ["x"]


def test_everything_granted() -> None:
    assert NoClaims().claim("a", ["1", "1"]) == [True, True]
    NoClaims().release("a", ["1"])


def test_without_the_pools_lease_everything_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarting or gone, it holds nobody up for long, and ends no run."""
    import ray
    from ray.exceptions import ActorDiedError, GetTimeoutError

    from taid_ray.teacher.pool import lease

    monkeypatch.setattr(lease, "find_lease", lambda name: MagicMock())
    claims = lease.PoolClaims("pool")
    for error in (ActorDiedError(), GetTimeoutError()):
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get", MagicMock(side_effect=error))
        assert claims.claim("a", ["1", "2"]) == [True, True]
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # then `.remote` would start a cluster
    calls = claims._lease.claim.remote.call_count
    assert claims.claim("a", ["1"]) == [True]
    claims.release("a", ["1"])
    assert claims._lease.claim.remote.call_count == calls and not claims._lease.release.remote.called
    monkeypatch.setattr(lease, "find_lease", lambda name: None)
    with pytest.raises(TeacherError, match="no teacher pool pool"):
        lease.PoolClaims("pool")
