"""Whether the Hugging Face hub answers at all. Its own client would retry for half a minute for each file it looks for."""

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

CONNECT_TIMEOUT_S = 3.0


def offline_if_unreachable(names: Iterable[str | None]) -> None:
    """If a name is nothing local and the hub does not answer, the cache alone serves this process and those it starts.

    A loader then says at once that it has not found a name there.
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
        import datasets

        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
