"""Description of a submitted job, in the metadata that `taid-ray submit` gives it and `taid_ray.cli.job` reads."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

METADATA_KEY = "taid_ray"


@dataclass(frozen=True)
class JobSpec:
    """Work of a submitted job."""

    version: str | None
    """Version of the taid-ray that submitted it; None if that was run from its sources."""
    config: dict[str, Any]
    """Resolved configuration of the run, or of all trials of a search."""
    search: dict[str, Any] | None = None
    """`space` and `options`, the other arguments of `cli.app.search`; None for a run."""

    def to_metadata(self) -> dict[str, str]:
        """The job's metadata, whose values Ray wants to be strings."""
        return {METADATA_KEY: json.dumps(asdict(self))}


def own_version() -> str | None:
    """The installed version; None if taid-ray is run from its sources."""
    try:
        return version("taid-ray")
    except PackageNotFoundError:
        return None
