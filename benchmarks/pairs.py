"""Small models that benchmarks train first, by this project's own SFT: the architecture and tokenizer of the bundled Llama."""

from pathlib import Path
from typing import Any

from taid_ray.cli.quickstart import BUNDLE
from taid_ray.config.schema import build_config
from taid_ray.driver.launch import distill

STORIES = BUNDLE / "stories260k"
CPUS = 2
"""Threads of the one worker, which trains alone."""


def trained_by_sft(run: Path, architecture: dict[str, Any], data: dict[str, Any], steps: int) -> Path:
    """Trains a new model with these fields of the Llama's config, unless `run` holds it already. Returns its directory.

    data: the section of the configuration.
    """
    config = build_config(
        {
            "name": run.name,
            "out": str(run),
            "device": "cpu",
            "teacher": None,
            "loss": {"name": "sft"},
            "student": {
                "model": str(STORIES),
                "init": "scratch",
                "architecture": architecture,
                "dtype": "float32",
                "cpus_per_worker": CPUS,
            },
            "data": data,
            "train": {
                "steps": steps,
                "batch_size": 32,
                "micro_batch_size": 16,
                "learning_rate": 3e-3,
                "warmup_steps": min(50, steps),
                "eval_every": max(1, steps // 5),
            },
        }
    )
    return distill(config).model
