"""A check whether the Hugging Face hub answers at all: its own client retries for half a minute for each file it wants."""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from taid_ray.config.paths import is_pattern
from taid_ray.config.schema import DistillConfig

CONNECT_TIMEOUT_S = 3.0
OFFLINE = "HF_HUB_OFFLINE"


def offline_if_unreachable(names: Iterable[str | None]) -> None:
    """Switches this process, and those it will start, to the hub's local cache if a name is not local and no hub answers.

    A loader then says at once that it has not found a name there. `restoring_hub_mode` switches back.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode() or all(
        name is None or is_pattern(name) or Path(name).expanduser().exists() for name in names
    ):
        return
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies():  # only the proxy knows
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), CONNECT_TIMEOUT_S).close()
    except OSError:
        _set_offline("1", True, True)


def hub_names(config: DistillConfig) -> list[str | None]:
    """Lists what a run may need from the hub: its models and data, where they are no local ones."""
    teacher = config.teacher.model if config.teacher else None
    return [teacher, config.student.model, *config.data.names]


@contextmanager
def restoring_hub_mode() -> Iterator[None]:
    """Restores at its end whether the hub is tried, so that one failure to reach it does not last for the whole process."""
    import datasets
    from huggingface_hub import constants

    before = os.environ.get(OFFLINE), constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        yield
    finally:
        _set_offline(*before)


def _set_offline(variable: str | None, hub: bool, data: bool) -> None:
    """Sets whether the hub is left alone: for processes to come, for huggingface_hub with transformers, and for datasets."""
    import datasets
    from huggingface_hub import constants

    os.environ.pop(OFFLINE, None)
    if variable is not None:
        os.environ[OFFLINE] = variable
    constants.HF_HUB_OFFLINE = hub
    datasets.config.HF_HUB_OFFLINE = data
