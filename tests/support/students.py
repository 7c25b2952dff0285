"""Configurations of small students of the bundled teacher, for tests in one process."""

import shutil
from pathlib import Path
from typing import Any

import torch

from taid_ray.config.models import TeacherConfig
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.models.loading import load_causal_lm
from tests.support.paths import BUNDLE

TIED: dict[str, Any] = {"init": "cut", "layers": [0, 4]}
SMALL_BUCKETS = {"zero_optimization": {"reduce_bucket_size": 1_000_000}}
"""By default every engine reserves 2 GB for gradients, and a process that has made many of them cannot fork any more."""


def config_for(student: dict[str, Any], **train: Any) -> DistillConfig:
    return build_config(
        {
            "teacher": {"model": str(BUNDLE / "stories260k"), "dtype": "float32", "mode": "local"},
            "student": {"dtype": "float32", "deepspeed": SMALL_BUCKETS} | student,
            "data": {
                "train": str(BUNDLE / "tinystories_train.jsonl"),
                "valid_documents": 4,
                "sequence_length": 64,
                "block_documents": 16,
            },
            "schedule": {"alpha": 1.0, "beta": 0.5},
            "train": {
                "steps": 4,
                "batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
                "weight_decay": 0.1,
            }
            | train,
        }
    )


def noisy_teacher(path: Path) -> Path:
    """Saves the bundled model with noise on its weights."""
    stories = str(BUNDLE / "stories260k")
    shutil.copytree(stories, path)
    model = load_causal_lm(TeacherConfig(model=stories))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(path)
    return path
