"""When a request to the teacher pool is late, and when to send copies of it to other replicas."""

import math
import statistics
from collections import deque

from taid_ray.teacher.pool.messages import ScoreResponse


class LatencyTracker:
    """Measures how long one client's answers usually take, from the time at which they could have been served."""

    KEPT, KNOWN = 64, 8
    """Answers remembered, and how many of them say what is usual."""
    LEAST_S = 1.0
    """No request is late before this."""

    def __init__(self, multiple: float):
        """multiple: of the usual time, after which a request is late; 0: it never is."""
        self._multiple = multiple
        self._seen: deque[tuple[float, str]] = deque(maxlen=self.KEPT)
        self._last = -math.inf

    def answered(self, submitted: float, now: float, answer: ScoreResponse) -> None:
        """Records an answer. submitted, now: time.monotonic() of the request and of the answer."""
        # With several replicas answers come in groups, all but the first of each without a wait; what their computation
        # took is what a request may take at least.
        waited = now - max(submitted, self._last)
        self._seen.append((max(waited, answer.compute_s), answer.replica))
        self._last = now

    @property
    def _usual_s(self) -> float:
        return statistics.median(seconds for seconds, _ in self._seen)

    @property
    def limit_s(self) -> float:
        """Seconds after which a request is late; infinite while little is known, or while only one replica answers."""
        others = len({replica for _, replica in self._seen}) > 1
        if not self._multiple or len(self._seen) < self.KNOWN or not others:
            return math.inf
        return max(self.LEAST_S, self._multiple * self._usual_s)

    def hedge(self, submitted: float) -> "Hedge":
        """Returns the hedge of a request that is waited for from now on.

        submitted: time.monotonic() of the request. Earlier answers may have kept the replicas busy until they came, so
        the request could be served only then.
        """
        if math.isinf(self.limit_s):
            return Hedge(math.inf, math.inf)
        return Hedge(max(submitted, self._last) + self.limit_s, self.limit_s, self._usual_s)


class Hedge:
    """Decides when to send a late request once more. Serve picks the replica, so several tries may be needed to reach another."""

    ATTEMPTS, PAUSE_S = 8, 0.25

    def __init__(self, at: float, again_s: float, usual_s: float = 0.0):
        """at: time.monotonic() from which the request is late. again_s: how long a second copy may take until it counts as
        stuck, too. usual_s: what answers take, to tell the user.
        """
        self.at, self._again_s, self.usual_s = at, again_s, usual_s
        self._attempts, self._pause_s = 0, self.PAUSE_S

    @property
    def begun(self) -> bool:
        """True once a copy was sent."""
        return self._attempts > 0

    def sent(self, now: float) -> None:
        """Records that a copy was sent."""
        self._attempts += 1
        self.at = now + self._again_s if self._attempts < self.ATTEMPTS else math.inf

    def refused(self, now: float) -> None:
        """Records that a copy reached the replica that has the request already; the next try comes after a longer pause."""
        if 0 < self._attempts < self.ATTEMPTS:
            self.at, self._pause_s = now + self._pause_s, 2 * self._pause_s
