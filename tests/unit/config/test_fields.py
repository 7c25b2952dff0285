"""What the fields say of their keys: the sets that follow from it are written out here once more.

A new key has none of these marks unless somebody decides so: then its name is added here too.
"""

import pytest

from taid_ray.config.data import DataConfig, SourceConfig
from taid_ray.config.fields import (
    EVALUATED,
    MOVABLE,
    RESUMABLE,
    SETS_RATES,
    SETS_ROWS,
    SETS_STEPS,
    TRAINING_ONLY,
    Mark,
    SharedByTrials,
)
from taid_ray.config.schema import known_keys, marks_of

SECTIONS = {"teacher", "student.lora", "loss.ctkd"}
"""Sections that may be null."""
RANGES = {"min", "max"}
EXPECTED: dict[Mark, str] = {
    RESUMABLE: """
        name out
        teacher.mode teacher.replicas teacher.shards teacher.cpus_per_shard teacher.max_tokens teacher.window
        teacher.window_mib teacher.hedge_after teacher.timeout_s teacher.idle_timeout_s
        student.workers student.cpus_per_worker student.zero_stage student.deepspeed student.gradient_checkpointing
        student.timeout_s student.max_failures
        loss.memory_mib train.micro_batch_size train.eval_every
        checkpoint.every_steps checkpoint.every_minutes checkpoint.keep checkpoint.best
        cache.directory cache.disk_gib tracking.wandb tracking.mlflow data.store
        data.sees_at_least
    """,
    MOVABLE: "data.train data.valid data.images_directory",
    SETS_STEPS: "train.steps train.epochs",
    SETS_ROWS: """
        student.model student.revision student.resize_to_teacher teacher.model teacher.revision train.batch_size
    """
    + " ".join(f"data.{name}" for name in DataConfig.model_fields),
    SETS_RATES: """
        teacher.model teacher.revision teacher.dtype teacher.quantization teacher.attention teacher.shards
        teacher.cpus_per_shard teacher.payload teacher.topk teacher.max_tokens
        student.model student.revision student.init student.layers student.architecture student.resize_to_teacher
        student.dtype student.attention student.cpus_per_worker student.deepspeed student.gradient_checkpointing student.freeze
        student.lora.rank student.lora.alpha student.lora.dropout student.lora.target_modules
        data.format data.images_column data.image_processor data.loss_on data.turns data.sequence_length data.pack data.overlong
        loss.name loss.published loss.memory_mib
    """,
    TRAINING_ONLY: "data.train data.split data.order data.store data.block_documents",
    EVALUATED: """
        device
        teacher.model teacher.revision teacher.dtype teacher.quantization teacher.attention teacher.trust_remote_code
        teacher.max_tokens
        student.model student.revision student.dtype student.attention student.trust_remote_code
    """
    + " ".join(f"data.{name}" for name in DataConfig.model_fields),
}


def keys() -> set[str]:
    """Every key that holds a value, without those of the items of lists; of a range the range itself."""
    return {
        key for key in known_keys() if key.rpartition(".")[2] not in RANGES and key not in SECTIONS and "[" not in key
    }


@pytest.mark.parametrize("mark", EXPECTED, ids=lambda mark: mark.meaning)
def test_marked_keys(mark: Mark) -> None:
    assert {key for key in keys() if mark in marks_of(key)} == set(EXPECTED[mark].split())


def test_keys_that_all_trials_of_a_search_share() -> None:
    shared = {key for key in keys() if any(isinstance(mark, SharedByTrials) for mark in marks_of(key))}
    assert shared == {
        "name",
        "out",
        "device",
        "cache.directory",
        "cache.disk_gib",
        "checkpoint.storage",
        "data.store",
    }


def test_keys_of_sources_are_marked_like_those_of_the_section() -> None:
    sources = {key.rpartition(".")[2] for key in known_keys() if key.startswith("data.train[].")}
    assert sources == set(SourceConfig.model_fields)
    for name in sources:
        marks = marks_of(f"data.train[3].{name}")
        assert (
            TRAINING_ONLY in marks
            and RESUMABLE not in marks
            and (MOVABLE in marks) == (name in ("path", "valid", "images_directory"))
        )
        same = marks_of("data.train" if name == "path" else f"data.{name}")
        assert (SETS_RATES in marks) == (SETS_RATES in same) and (MOVABLE in marks) == (MOVABLE in same)


def test_keys_below_a_field_have_its_marks_and_unknown_ones_none() -> None:
    for key in ("teacher.replicas.max", "student.deepspeed.zero_optimization.stage", "cache"):
        assert RESUMABLE in marks_of(key)
    assert marks_of("student.lora.rank") == [SETS_RATES] and marks_of("train") == marks_of("nothing.at.all") == []
