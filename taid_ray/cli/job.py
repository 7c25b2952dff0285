"""Entry point of a Ray job that `taid-ray submit` made: `python -m taid_ray.cli.job`, on the cluster.

What to do travels in the job's metadata, which Ray hands to the entry point alone. In the working directory it would give
that another hash, and so relative paths another place, whenever a key changes.
"""

import json

from taid_ray.cli import app as cli
from taid_ray.config.schema import build_config
from taid_ray.control.order import METADATA_KEY, Order, own_version
from taid_ray.errors import ConfigError
from taid_ray.run.live import job_metadata


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
        from taid_ray.config.space import Space

        cli.search(config, Space.model_validate(order.search["space"]), **order.search["options"])


if __name__ == "__main__":
    main()
