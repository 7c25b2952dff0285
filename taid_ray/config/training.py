"""The sections `train`, `checkpoint`, `cache` and `tracking`."""

from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from taid_ray.config.fields import (
    RESUMABLE,
    SETS_ROWS,
    SETS_STEPS,
    BelowOne,
    Count,
    Int,
    Name,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    SharedByTrials,
    home_checked,
)


class TrainConfig(Section):
    """The length of the training, its batches, and the AdamW optimizer."""

    steps: Annotated[PositiveInt | None, SETS_STEPS] = None
    """Number of optimizer steps. Give either this or `epochs`."""
    epochs: Annotated[Positive | None, SETS_STEPS] = None
    """Number of passes over the training data, which need not be whole. Give either this or `steps`."""
    batch_size: Annotated[PositiveInt, SETS_ROWS] = 64
    """Rows per optimizer step, over all workers together."""
    micro_batch_size: Annotated[PositiveInt, RESUMABLE] = 8
    """Rows that a worker puts through the model at once. Gradients are accumulated over as many micro-batches as it takes."""
    learning_rate: Positive = 1e-4
    """Highest learning rate of AdamW."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up. `cosine` and `linear` end at 0."""
    warmup_steps: Count = 0
    """Steps over which the learning rate first rises, linearly, to its highest value."""
    weight_decay: NonNegative = 0.01
    """Weight decay of AdamW. It acts on matrices only, not on biases and norms."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    epsilon: Positive = 1e-8
    """AdamW's epsilon, which is added to the denominator of its update."""
    max_grad_norm: NonNegative = 1.0
    """Largest norm of the whole gradient; a larger one is scaled down to it. 0 turns this off."""
    seed: Int = 0
    """Seed of the order of the data, of new weights and of dropout."""
    eval_every: Annotated[Count, RESUMABLE] = 0
    """Number of steps between validations. With 0 only the first and the last model are validated."""

    @model_validator(mode="after")
    def _length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            found = "both" if self.steps is not None else "neither"
            raise ValueError(f"give exactly one of train.steps and train.epochs (found {found})")
        return self


class CheckpointConfig(Section):
    """Times and place of checkpoints. A run that is stopped saves one in any case."""

    every_steps: Annotated[PositiveInt | None, RESUMABLE] = None
    """Number of optimizer steps between checkpoints; null: none are saved by the number of steps."""
    every_minutes: Annotated[Positive | None, RESUMABLE] = 10.0
    """Minutes between checkpoints; null: none are saved by time."""
    keep: Annotated[PositiveInt, RESUMABLE] = 2
    """Number of checkpoints that are kept, the newest ones."""
    best: Annotated[Literal["cross_entropy", "kl"] | None, RESUMABLE] = None
    """Also save a checkpoint at every validation, and keep the one with the lowest value of this figure."""
    storage: Annotated[Name | None, SharedByTrials("every trial has a directory of its own in it")] = None
    """Where checkpoints are kept: a directory that all nodes see, or a URI such as `s3://bucket/path`. Each run makes a
    directory of its own there. Default: `RUN/checkpoints`."""


class CacheConfig(Section):
    """The teacher's outputs, kept on disk for later epochs, for other trials of a search, and for later runs."""

    directory: Name | None = None
    """Directory that keeps the teacher's outputs: one that all nodes see, or a local one on each node, which is in memory if it
    lies in `/dev/shm`. By default no outputs are kept."""
    disk_gib: Positive = 50.0
    """Largest size (GiB) of the directory. The samples that have gone unused for longest make room for new ones."""

    @property
    def on(self) -> bool:
        """True if outputs are kept."""
        return self.directory is not None

    @model_validator(mode="before")
    @classmethod
    def _without_memory(cls, values: Any) -> Any:
        """Ignores the removed key memory_gib where it is 0, as in the config.yaml of older runs; else refuses it."""
        if not isinstance(values, dict) or "memory_gib" not in values:
            return values
        if values["memory_gib"]:
            raise ValueError(
                "cache.memory_gib is no key any more; to keep the teacher's outputs in memory, set cache.directory to a "
                "directory in it, for example cache.directory: /dev/shm/taid-ray-cache, and cache.disk_gib to its size"
            )
        return {key: value for key, value in values.items() if key != "memory_gib"}

    @field_validator("directory")
    @classmethod
    def _directory(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError("remote storage is not offered; name a directory")
        return home_checked(value)


class TrackingConfig(Section):
    """Trackers that a run's figures go to, in addition to its own files and TensorBoard's. W&B and MLflow take everything else
    from their own environment variables (`WANDB_API_KEY`, `WANDB_MODE`, `MLFLOW_TRACKING_URI` ...), set where `taid-ray` is
    started."""

    wandb: Name | None = None
    """Weights & Biases project that gets the run. Needs the package wandb: `pip install 'taid-ray[wandb]'`."""
    mlflow: Name | None = None
    """MLflow experiment that gets the run. Needs the package mlflow: `pip install 'taid-ray[mlflow]'`."""
