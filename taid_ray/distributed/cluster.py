"""The Ray cluster of a run: joined if RAY_ADDRESS names one, else a local one that ends with the run."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from taid_ray.distributed.capacity import STUDENT_RESOURCE, TEACHER_RESOURCE
from taid_ray.errors import ClusterError

CONNECT_TIMEOUT_S = 5.0


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Joins the cluster this process is connected to, or that RAY_ADDRESS names; else starts one and stops it again.

    Raises ClusterError if nothing answers at RAY_ADDRESS, or if the path of the temporary directory is too long for Ray.
    """
    if ray.is_initialized():
        yield
        return
    joins = bool(os.environ.get("RAY_ADDRESS"))
    cores = os.cpu_count() or 1
    if joins:
        join_cluster(os.environ["RAY_ADDRESS"])
    else:
        # Both roles get a resource of their own, as nodes of a real cluster should.
        roles = {STUDENT_RESOURCE: 1000, TEACHER_RESOURCE: 1000}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            context = ray.init(
                address="local", num_cpus=max(2, cores), resources=roles, logging_level="ERROR", log_to_driver=False
            )
        except OSError as error:
            if "AF_UNIX" not in str(error):
                raise
            raise ClusterError(
                f"Ray cannot make its sockets in the temporary directory, whose path is too long ({error}); "
                "set RAY_TMPDIR to a shorter one, such as /tmp"
            ) from error
        # Ray's own helpers look for a cluster by this variable; a second cluster on this machine would confuse them.
        os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    _end_by_sigterm()
    try:
        yield
    finally:
        ray.shutdown()
        if not joins:
            os.environ.pop("RAY_ADDRESS", None)


def _end_by_sigterm() -> None:
    """Replaces the handler of SIGTERM that Ray has just set by one with the exit code that a shell and a cluster expect."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def join_cluster(address: str) -> None:
    """Connects to the cluster at `address`, which RAY_ADDRESS names. Raises ClusterError if nothing answers there."""
    try:
        host, _, port = address.rpartition("://")[2].rpartition(":")
        if port.isdigit():  # else a word such as `auto`
            # Ray itself would try for minutes, and then end the process.
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS = {address}: no Ray cluster answers there ({' '.join(str(error).split())}); "
            "correct it, or unset it to run on this machine alone"
        ) from error


def cluster_has_gpus() -> bool:
    """Tests whether some node of the connected cluster offers a GPU."""
    return ray.cluster_resources().get("GPU", 0) > 0
