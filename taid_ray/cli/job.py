"""Entry point of a Ray job that `taid-ray submit` made: `python -m taid_ray.cli.job`, on the cluster.

What to do travels in the job's metadata, which Ray hands to the entry point alone. In the working directory it would give
that another hash, and so relative paths another place, whenever a key changes.
"""

import json
import sys

from taid_ray.control.job_spec import METADATA_KEY, JobSpec, own_version
from taid_ray.errors import ConfigError


def main() -> None:
    """Runs the job as the entry point of a command."""
    try:
        from taid_ray.cli import app as cli
    except ModuleNotFoundError as error:  # taid-ray came in the working directory, say, and typer did not
        sys.exit(f"{sys.executable}: No module named {error.name!r}, which taid-ray needs")
    cli.guarded(run_job)


def run_job() -> None:
    """Runs what the job's metadata describe. Raises ConfigError if the cluster has another taid-ray than submitted the job."""
    from taid_ray.cli import app as cli
    from taid_ray.config.schema import build_config
    from taid_ray.run.live import job_metadata

    job_spec = JobSpec(**json.loads(job_metadata().get(METADATA_KEY, "{}")))
    if None not in (job_spec.version, own_version()) and job_spec.version != own_version():
        raise ConfigError(
            f"the cluster has taid-ray {own_version()}, and this job was submitted by taid-ray {job_spec.version}; use the "
            "same version on both sides (cluster/Dockerfile makes the cluster's image)"
        )
    config = build_config(job_spec.config)
    if job_spec.search is None:
        cli.run(config)
    else:
        from taid_ray.config.space import Space

        cli.search(config, Space.model_validate(job_spec.search["space"]), **job_spec.search["options"])


if __name__ == "__main__":
    main()
