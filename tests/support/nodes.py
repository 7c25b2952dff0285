"""A Ray cluster of several nodes on this machine, beside the one that the tests share and are connected to."""

from typing import Any

import psutil

# A node is given up after three seconds instead of half a minute.
DETECTION = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A head, and nodes that come and go. This process is connected to none of them."""

    def __init__(self, **head: Any) -> None:
        """head: arguments of the head's raylet."""
        from ray.cluster_utils import Cluster
        from ray.experimental.internal_kv import internal_kv_get_gcs_client

        self._own_cluster = internal_kv_get_gcs_client()
        self._cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": DETECTION})
        self.address: str = self._cluster.address
        self._nodes: dict[str, Any] = {}

    def __contains__(self, node: str) -> bool:
        return node in self._nodes

    def add(self, **resources: float) -> str:
        """Adds a node with one CPU and these resources; returns its id."""
        node = self._cluster.add_node(num_cpus=1, resources=resources)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def lose(self, node: str) -> None:
        """At once and without a word, as when its power fails."""
        self._cluster.remove_node(self._nodes.pop(node), allow_graceful=False)

    def workers(self, node: str) -> list[psutil.Process]:
        """All processes that a node's raylet has started."""
        (raylet,) = self._nodes[node].all_processes["raylet"]
        return list(psutil.Process(raylet.process.pid).children(recursive=True))

    def close(self) -> None:
        from ray.experimental.internal_kv import _initialize_internal_kv

        self._cluster.shutdown()
        if self._own_cluster is not None:  # which shutdown makes this process forget, and Serve needs
            _initialize_internal_kv(self._own_cluster)
