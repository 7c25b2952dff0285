"""Notice that the node of this process is about to go: a cloud takes it back, or an operator drains it."""

import threading
from contextlib import suppress

import ray
from ray.exceptions import RayError

from taid_ray.distributed.ray_internals import draining_nodes
from taid_ray.distributed.world import World

POLL_S = 2.0


def watch_node(world: World) -> "PreemptionWatch | None":
    """The watch over this worker's node, on the first of the workers that run there; None on the others. Collective.

    Nodes are told apart by Ray's ids and not by LOCAL_RANK: Ray Train counts that by address, which several nodes may share.
    """
    node = ray.get_runtime_context().get_node_id()
    return PreemptionWatch(node) if world.gather(node).index(node) == world.rank else None


class PreemptionWatch:
    """Asks the cluster every POLL_S, in a thread of its own, whether this node is being drained.

    One worker per node keeps it: the answer is the same for all, and one process answers the whole cluster.
    """

    def __init__(self, node: str) -> None:
        """node: Ray's id of this process's node."""
        self.draining = False
        """Whether the node is about to go."""
        self._closed = threading.Event()
        self._node = node
        threading.Thread(target=self._watch, name="taid-preemption", daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self.draining and ray.is_initialized():
            with suppress(RayError):  # the head is being restarted
                self.draining = self._node in draining_nodes()
            if self._closed.wait(POLL_S):
                return
