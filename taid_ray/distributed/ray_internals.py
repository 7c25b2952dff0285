"""Functions over Ray's private API, of which the package uses nothing elsewhere.

pyproject.toml bounds Ray's version for its sake. All but `torch_backend` need a connection to a cluster. One more private
name, the id of an actor's handle, stands in `teacher.pool.autoscaling`, whose policy Serve's controller gets by value and
without this package.
"""

from collections.abc import Container
from typing import Any

from ray._private.services import get_webui_url_from_internal_kv
from ray._private.state import available_resources_per_node, state


def free_resources() -> dict[str, dict[str, float]]:
    """Returns what every living node has free now: node id -> resource -> amount."""
    return dict(available_resources_per_node())


def draining_nodes() -> Container[str]:
    """Returns the ids of the nodes that a cloud takes back soon, or that an operator drains."""
    return state.get_draining_nodes()


def dead_jobs() -> set[str]:
    """Returns the ids of the jobs (drivers) of this cluster that are over."""
    return {job["JobID"] for job in state.job_table() if job["IsDead"]}


def dashboard_address() -> str | None:
    """Returns HOST:PORT of the cluster's dashboard; None where there is none."""
    return get_webui_url_from_internal_kv() or None


def torch_backend() -> type[Any]:
    """Returns the class that starts the process group of Ray Train's workers. Imports Ray Train, which takes a second."""
    from ray.train.torch.config import _TorchBackend

    return _TorchBackend
