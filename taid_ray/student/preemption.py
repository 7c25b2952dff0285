"""Whether the node of this process is about to go: Ray marks nodes that a cloud takes back, or an operator drains."""

import threading
from contextlib import suppress

import ray
from ray.exceptions import RayError

from taid_ray.distributed.ray_internals import draining_nodes

POLL_S = 2.0


class PreemptionWatch:
    """Asks the cluster every POLL_S in a thread of its own, as long as this process is connected to it."""

    def __init__(self) -> None:
        self.given = False
        self._node = ray.get_runtime_context().get_node_id()
        threading.Thread(target=self._watch, name="taid-leave-notice", daemon=True).start()

    def _watch(self) -> None:
        stopped = threading.Event()
        while not self.given and ray.is_initialized():
            with suppress(RayError):  # the head is being restarted
                self.given = self._node in draining_nodes()
            stopped.wait(POLL_S)
