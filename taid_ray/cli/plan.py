"""The command `taid-ray plan`: prints a Forecast as tables, or as JSON."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from taid_ray.config.schema import DistillConfig, load_config
from taid_ray.errors import ConfigError
from taid_ray.plan.hardware import NAMES, hardware_named
from taid_ray.report.history import History, read_history

UTILISATION = 0.4
IMAGE_SIZE = "1024x768"
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
    run: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Take the rates from the metrics.jsonl of a run of the same models."
        ),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="WxH", help=f"Pixels of every image (default: {IMAGE_SIZE}).")
    ] = None,
    images_per_row: Annotated[int | None, typer.Option(min=1, help="Images in every row (default: 1).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, seconds, operations.")] = False,
) -> None:
    """Say what a configuration will need and how long it will take, without loading weights."""
    loaded = load_config(config, overrides or [])
    history = None if run is None else read_history(run)
    hardware = hardware_named(gpu or default_gpu(loaded, history))
    check_numbers(tokens, utilisation, price_per_gpu_hour)
    size = image_numbers(loaded, image_size, images_per_row)
    progress = Console(stderr=True)
    progress.print("loading torch and transformers", highlight=False)
    from taid_ray.plan.forecast import forecast
    from taid_ray.plan.from_run import run_figures
    from taid_ray.plan.images import row_images
    from taid_ray.plan.inputs import PlanInputs, read_models
    from taid_ray.plan.tables import show

    models = read_models(loaded)
    images = row_images(loaded, models.teacher, models.student, size, images_per_row or 1)
    inputs = PlanInputs(loaded, models, hardware, images)
    found = forecast(
        inputs,
        utilisation=utilisation,
        tokens=tokens,
        price_per_hour=price_per_gpu_hour,
        run=None if history is None else run_figures(history, inputs),
        on_wait=lambda message: progress.print(message, highlight=False),
    )
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        show(found, Console(width=max(MIN_WIDTH, Console().width)))


def default_gpu(config: DistillConfig, history: History | None) -> str:
    """Returns what --gpu is where it is not given.

    Raises ConfigError if the rates are those of a run, which does not say on what GPU it ran.
    """
    if config.device == "cpu" or (history is not None and history.config.device == "cpu"):
        return "cpu"
    if history is not None:
        raise ConfigError(
            f"--from {history.path}: the run does not say on what hardware it ran (device: {history.config.device}); name it "
            f"with --gpu ({', '.join(NAMES)})"
        )
    return DEFAULT_GPU


def image_numbers(config: DistillConfig, size: str | None, per_row: int | None) -> tuple[int, int]:
    """Returns width and height of the planned images. Raises ConfigError for options about images without a use or a meaning."""
    for option, value in (("--image-size", size), ("--images-per-row", per_row)):
        if value is not None and not config.data.has_images:
            raise ConfigError(f"{option} {value}: this run has no images; set data.images_column, or leave it out")
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size or IMAGE_SIZE)
    if found is None:
        raise ConfigError(f"--image-size: width and height in pixels, such as {IMAGE_SIZE} (found {size})")
    return int(found[1]), int(found[2])


def check_numbers(tokens: float | None, utilisation: float, price: float | None) -> None:
    """Raises ConfigError for values of options that mean nothing."""
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation: a share of the peak lies above 0 and is at most 1 (found {utilisation:g})")
    if tokens is not None and not 0 < tokens < float("inf"):
        raise ConfigError(f"--tokens: must be a number above 0 (found {tokens:g})")
    if price is not None and not 0 <= price < float("inf"):
        raise ConfigError(f"--price-per-gpu-hour: must be a number of at least 0 (found {price:g})")
