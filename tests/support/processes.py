"""Processes of a teacher pool, found by their titles."""

from contextlib import suppress

import psutil


def replica_processes(pool: str) -> list[psutil.Process]:
    return processes(f"ServeReplica:{pool}:teacher")


def processes(title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found
