"""Entry point of a Ray job that `taid-ray submit` made: `python -m taid_ray.job`, on the cluster.

What to do travels in the job's metadata, which Ray hands to the entry point alone. In the working directory it would give
that another hash, and so relative paths another place, whenever a key changes.
"""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from taid_ray import cli
from taid_ray.config import build_config
from taid_ray.errors import ConfigError
from taid_ray.live_file import job_metadata

METADATA_KEY = "taid_ray"


@dataclass(frozen=True)
class Order:
    """What the job is to do."""

    version: str | None
    """Of the taid-ray that submitted it; None if that was not installed, but run from its sources."""
    config: dict[str, Any]
    """Of the run, or of all trials of a search, resolved."""
    search: dict[str, Any] | None = None
    """`space`, and the other arguments of cli.run_search; None for a run."""

    def to_metadata(self) -> dict[str, str]:
        """Which Ray wants to be of strings."""
        return {METADATA_KEY: json.dumps(asdict(self))}


def own_version() -> str | None:
    """None if only the sources are there."""
    try:
        return version("taid-ray")
    except PackageNotFoundError:
        return None


def main() -> None:
    cli.guarded(obey)


def obey() -> None:
    """Raises ConfigError if this is not the taid-ray that the job was checked by."""
    order = Order(**json.loads(job_metadata().get(METADATA_KEY, "{}")))
    if None not in (order.version, own_version()) and order.version != own_version():
        raise ConfigError(
            f"the cluster has taid-ray {own_version()}, and this job was submitted by taid-ray {order.version}; use the "
            "same version on both sides (cluster/Dockerfile makes the cluster's image)"
        )
    config = build_config(order.config)
    if order.search is None:
        cli.run(config)
    else:
        from taid_ray.space import Space

        cli.run_search(config, Space.model_validate(order.search["space"]), **order.search["options"])


if __name__ == "__main__":
    main()
