"""Whether the Hugging Face hub answers at all. Its own client would retry for half a minute for each file it looks for."""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

CONNECT_TIMEOUT_S = 3.0
OFFLINE = "HF_HUB_OFFLINE"


def offline_if_unreachable(names: Iterable[str | None]) -> None:
    """If a name is nothing local and the hub does not answer, the cache alone serves this process and those it starts.

    A loader then says at once that it has not found a name there. `restoring_hub_mode` ends it.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode() or all(name is None or Path(name).expanduser().exists() for name in names):
        return
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies():  # only the proxy knows
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), CONNECT_TIMEOUT_S).close()
    except OSError:
        _set_offline("1", True, True)


@contextmanager
def restoring_hub_mode() -> Iterator[None]:
    """At its end the hub is tried again, or not, as at its beginning: one silence must not last for the whole process."""
    import datasets
    from huggingface_hub import constants

    before = os.environ.get(OFFLINE), constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        yield
    finally:
        _set_offline(*before)


def _set_offline(variable: str | None, hub: bool, data: bool) -> None:
    """For processes started from now on, for huggingface_hub with transformers, and for datasets."""
    import datasets
    from huggingface_hub import constants

    os.environ.pop(OFFLINE, None)
    if variable is not None:
        os.environ[OFFLINE] = variable
    constants.HF_HUB_OFFLINE = hub
    datasets.config.HF_HUB_OFFLINE = data
