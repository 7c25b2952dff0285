"""The student workers' process group, over the network that Ray uses between nodes, and with its room freed if it fails."""

import os
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig

from taid_ray.distributed.ray_internals import torch_backend

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class RayNetworkConfig(TorchConfig):
    """Ray Train's TorchConfig, but gloo takes the network interface of Ray's node address.

    By itself it takes that of the address which the host name resolves to. On many hosts that is a loopback address (Debian
    writes 127.0.1.1 into /etc/hosts), which other nodes cannot reach.
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
    """Sets gloo's network interface, in a worker's process, before its process group starts; unless the user has set it."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(GLOO_INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Finds the name of this host's network interface with an IP address; None if it has none, as behind a translated address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return None
