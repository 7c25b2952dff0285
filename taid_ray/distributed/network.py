"""The student workers' process group: over the network that Ray itself uses between their nodes, and gone if it fails."""

import os
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig

from taid_ray.distributed.ray_internals import torch_backend

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class RayNetworkConfig(TorchConfig):
    """As Ray Train's, but gloo does not go by what a node's host name resolves to.

    That is a loopback address on many hosts (Debian writes 127.0.1.1 into /etc/hosts), which other nodes cannot reach.
    """

    @property
    def backend_cls(self) -> type[Any]:
        return _RayNetworkBackend


class _RayNetworkBackend(torch_backend()):  # type: ignore[misc]  # known at run time only
    def on_start(self, worker_group, backend_config) -> None:  # type: ignore[no-untyped-def]  # Ray's, not public
        try:
            worker_group.execute(use_ray_network)
            super().on_start(worker_group, backend_config)
        except Exception:
            # Ray Train (2.60) forgets a group whose processes started and did not find each other: their placement group
            # would keep its room for as long as the driver lives, and no later attempt could start.
            worker_group.abort()
            raise


def use_ray_network() -> None:
    """In a worker's process, before its process group starts. Leaves alone what the user has set."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(GLOO_INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Name of this host's network interface with an IP address; None if it has none, as behind a translated address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return None
