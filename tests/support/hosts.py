"""Hosts on one machine: each with its own network address, name, processes and shared memory. Linux, as root.

A host is a set of namespaces that its first process keeps alive; when that one ends, so does everything on the host.
The hosts are joined by a switch, where a cable can be pulled. They share the machine's file system, as real ones would
share a network's.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

NETWORK = "10.213.77"
"""First three numbers of the hosts' addresses, which nothing outside of the namespaces sees."""
RAY_TEMP = "/tmp/ray"
READY_S = 10.0
END_S = 30.0

# The first process of a host: mounts anew what hosts do not share, and waits for children that nobody else waits for. It
# ends when its standard input does, and with it everything on the host.
FIRST = f"""
set -e
mkdir -p {RAY_TEMP}
mount -t tmpfs -o size=2g tmpfs {RAY_TEMP}
mount -t tmpfs -o size=2g tmpfs /dev/shm
hostname "$1"
ip link set lo up
echo ready
exec {sys.executable} -c '
import os, select
while not select.select([0], [], [], 0.2)[0]:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
'
"""


def why_not() -> str | None:
    """What keeps this machine from having such hosts; None: nothing."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if missing := [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root"
    probe = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
    made = subprocess.run(
        [*probe, "sh", "-c", "ip link add taid0 type veth peer name taid1 && mount -t tmpfs tmpfs /dev/shm"],
        capture_output=True,
        text=True,
        timeout=READY_S,
    )
    return f"this machine does not allow namespaces: {made.stderr.strip()}" if made.returncode else None


class Switch:
    """What joins the hosts; a namespace of its own, so that the machine's network is left alone."""

    def __init__(self) -> None:
        self._keeper = _in_namespaces("--net", "ip link add br0 type bridge; ip link set br0 up; echo ready; exec cat")
        self.pid = _only_child(self._keeper)

    def plug(self, port: str, host_pid: int, address: str) -> None:
        """Connects a host, which then has `address`."""
        self.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host_pid))
        self.run("ip", "link", "set", port, "master", "br0", "up")
        on_host = ["nsenter", "-t", str(host_pid), "-n", "ip"]
        subprocess.run([*on_host, "address", "add", f"{address}/24", "dev", "eth0"], check=True)
        subprocess.run([*on_host, "link", "set", "eth0", "up"], check=True)

    def run(self, *command: str) -> None:
        subprocess.run(["nsenter", "-t", str(self.pid), "-n", *command], check=True)

    def close(self) -> None:
        _end(self._keeper)


class Host:
    """One machine of a cluster."""

    def __init__(self, switch: Switch, number: int, logs: Path):
        self.name, self.address = f"taid-host-{number}", f"{NETWORK}.{number}"
        self._switch, self._port, self._logs = switch, f"port{number}", logs
        self._keeper = _in_namespaces("--net --mount --uts --pid --mount-proc", FIRST, self.name)
        self.pid = _only_child(self._keeper)
        switch.plug(self._port, self.pid, self.address)

    def popen(self, command: Sequence[str], log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command on this host. log: name of the file for all it prints."""
        with (self._logs / f"{self.name}-{log}.log").open("ab") as file:
            return subprocess.Popen(
                ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-p", *command],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self._logs,
            )

    def log(self, name: str) -> str:
        path = self._logs / f"{self.name}-{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self) -> list[int]:
        """On this host, as this machine numbers them."""
        mine = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if int(entry.name) != self.pid and os.stat(entry / "ns/pid").st_ino == mine:
                    found.append(int(entry.name))
        return found

    def cut_off(self) -> None:
        """Pulls the cable: packets vanish, nothing is told."""
        self._switch.run("ip", "link", "set", self._port, "down")

    def bring_back(self) -> None:
        self._switch.run("ip", "link", "set", self._port, "up")

    def close(self) -> None:
        _end(self._keeper)


def _in_namespaces(kinds: str, script: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A shell in new namespaces, once it has said that it is ready; it ends with this process."""
    keeper = subprocess.Popen(
        ["unshare", *kinds.split(), "--fork", "sh", "-c", script, "sh", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert keeper.stdout is not None
    said = keeper.stdout.readline()
    assert said == b"ready\n", f"the namespaces {kinds} could not be made"
    return keeper


def _only_child(keeper: subprocess.Popen[bytes]) -> int:
    """unshare waits for the process that is in the namespaces."""
    return int(Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()[0])


def _end(keeper: subprocess.Popen[bytes]) -> None:
    assert keeper.stdin is not None
    keeper.stdin.close()
    keeper.wait(END_S)


def wait_until(holds: Callable[[], object], seconds: float, what: str) -> float:
    """Returns after how many seconds it held. Fails with `what`."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)
    return time.monotonic() - start
