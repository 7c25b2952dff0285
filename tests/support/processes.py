"""Processes of a teacher pool on this session's own cluster, found by their titles."""

from contextlib import suppress

import psutil


def replica_processes(pool: str) -> list[psutil.Process]:
    return processes(f"ServeReplica:{pool}:teacher")


def processes(title: str) -> list[psutil.Process]:
    """Of this process's descendants, which Ray's local cluster is: never those of another session on this host."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found
