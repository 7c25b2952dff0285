"""What a submitted job is to do, as the metadata that `taid-ray submit` gives it and `taid_ray.cli.job` reads."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

METADATA_KEY = "taid_ray"


@dataclass(frozen=True)
class JobSpec:
    """What the job is to do."""

    version: str | None
    """Of the taid-ray that submitted it; None if that was not installed, but run from its sources."""
    config: dict[str, Any]
    """Of the run, or of all trials of a search, resolved."""
    search: dict[str, Any] | None = None
    """`space`, and the other arguments of search.driver.run_search; None for a run."""

    def to_metadata(self) -> dict[str, str]:
        """Which Ray wants to be of strings."""
        return {METADATA_KEY: json.dumps(asdict(self))}


def own_version() -> str | None:
    """None if only the sources are there."""
    try:
        return version("taid-ray")
    except PackageNotFoundError:
        return None
