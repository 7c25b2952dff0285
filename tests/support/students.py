"""Configurations of small students of the bundled teacher, for tests in one process."""

from typing import Any

from taid_ray.config.schema import DistillConfig, build_config
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
