"""`taid-ray plan`: a Forecast as tables, or as JSON."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from taid_ray.config.schema import DistillConfig, load_config
from taid_ray.errors import ConfigError
from taid_ray.plan.hardware import NAMES, hardware_named

UTILISATION = 0.4
DEFAULT_GPU = "h100-80g"
MIN_WIDTH = 100
"""Columns that the tables need; on a narrower terminal lines wrap, where figures would be cut off."""


def plan(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted key=value pairs.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(NAMES)} (this machine's cores). Default: {DEFAULT_GPU}, or by `device`."),
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, for time and cost (4e9).")] = None,
    utilisation: Annotated[
        float, typer.Option(help="Share of the peak that matmuls reach: an assumption.")
    ] = UTILISATION,
    price_per_gpu_hour: Annotated[
        float | None,
        typer.Option(help="Your price of one GPU (with --gpu cpu: of one core) for an hour, any currency."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Make a few real steps first, here or on the cluster that RAY_ADDRESS names."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, seconds, operations.")] = False,
) -> None:
    """Say what a configuration will need and how long it will take: without loading weights, unless --measure."""
    loaded = load_config(config, overrides or [])
    hardware = hardware_named(gpu or default_gpu(loaded))
    check_numbers(tokens, utilisation, price_per_gpu_hour)
    progress = Console(stderr=True)
    progress.print("loading torch and transformers", highlight=False)
    from taid_ray.plan.forecast import forecast
    from taid_ray.plan.inputs import read_models
    from taid_ray.plan.tables import show

    models, measured = read_models(loaded), None
    if measure:
        from taid_ray.plan.measure import measure as measure_here

        measured = measure_here(loaded, progress, gpu)
        hardware = hardware if measured.on_gpus or gpu else hardware_named("cpu")
    found = forecast(
        loaded,
        models,
        hardware,
        utilisation=utilisation,
        tokens=tokens,
        price_per_hour=price_per_gpu_hour,
        measured=measured,
        on_wait=lambda message: progress.print(message, highlight=False),
    )
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found, Console(width=max(MIN_WIDTH, Console().width)))


def default_gpu(config: DistillConfig) -> str:
    """What --gpu is where it is not given."""
    return "cpu" if config.device == "cpu" else DEFAULT_GPU


def check_numbers(tokens: float | None, utilisation: float, price: float | None) -> None:
    """Raises ConfigError for values of options that mean nothing."""
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation: a share of the peak lies above 0 and is at most 1 (found {utilisation:g})")
    if tokens is not None and not 0 < tokens < float("inf"):
        raise ConfigError(f"--tokens: must be a number above 0 (found {tokens:g})")
    if price is not None and not 0 <= price < float("inf"):
        raise ConfigError(f"--price-per-gpu-hour: must be a number of at least 0 (found {price:g})")
