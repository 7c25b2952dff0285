"""The configuration: one typed, frozen tree. The text under each field is its help.

`load_config` reads YAML plus dotted `key=value` overrides. Everything that can be known to be wrong without opening a
model or a cluster is refused here, with the dotted key, the value found and the remedy.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from taid_ray.config.text import CREDENTIALS, apply_override, explain, read_tree, set_key
from taid_ray.errors import ConfigError


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take `yes` and `on`, which YAML reads as true, for 1
        raise ValueError("must be a number")
    return value


def _name(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    address = value.partition("://")[2]
    if re.match(r"[^@]*:[^@]*@", address) or re.search(r"[?&][^=]*(secret|token|key|password)[^=]*=", address, re.I):
        raise ValueError(
            f"{CREDENTIALS}, because config.yaml is copied and shown; give them to the storage's library by its "
            "environment variables or its own files"
        )
    return value


def _home_checked(path: str | None) -> str | None:
    try:
        Path(path or "").expanduser()
    except RuntimeError:
        raise ValueError("there is no such home directory; write the path without '~'") from None
    return path


Name = Annotated[str, AfterValidator(_name)]
Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
PositiveInt = Annotated[Int, Field(ge=1)]
Count = Annotated[Int, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Unit = Annotated[Float, Field(ge=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
LossName = Literal["taid", "forward_kl", "reverse_kl", "js", "tvd", "skew_forward_kl", "skew_reverse_kl"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
Payload = Literal["hidden", "hidden_int8", "hidden_fp8", "topk", "logits"]
WEIGHTED_LOSSES = ("js", "skew_forward_kl", "skew_reverse_kl")

# taid-ray sets these DeepSpeed keys itself; a second value for any of them would change the trajectory silently, or be
# ignored. What to set instead:
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "managed_gradient_accumulation": "nothing: the training loop owns the step",
    "optimizer": "train.learning_rate and its neighbours",
    "zero_allow_untested_optimizer": "nothing: the optimizer is always torch's AdamW",
    "zero_force_ds_cpu_optimizer": "nothing: the optimizer is always torch's AdamW",
    "scheduler": "train.lr_schedule",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "student.dtype",
    "bfloat16": "student.dtype",
    "fp16": "student.dtype (float16 loss scaling skips steps and is not offered)",
    "amp": "student.dtype",
    "data_types": "nothing: gradients are summed in float32",
    "steps_per_print": "nothing: taid-ray reports progress itself",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Range(Section):
    """How many there may be; a whole number stands for a range of that number only."""

    min: PositiveInt
    """Fewest."""
    max: PositiveInt
    """Most."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        if isinstance(value, dict | Range):
            return value
        if isinstance(value, list) and len(value) == 2:
            return {"min": value[0], "max": value[1]}
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError("must be a whole number of at least 1, or {min: A, max: B}")
        return {"min": value, "max": value}

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}; lower min")
        return self

    @model_serializer
    def _as_number(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}

    @property
    def fixed(self) -> bool:
        return self.min == self.max


class TeacherConfig(Section):
    model: Name
    """Hub name or local directory of the teacher."""
    revision: str | None = None
    """Hub revision of the teacher."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the teacher's weights and of what it sends; `auto` takes the checkpoint's own."""
    quantization: dict[str, Any] = {}
    """Passed to transformers as `quantization_config` (for example `{quant_method: bitsandbytes, load_in_4bit: true}`)."""
    attention: Attention = "sdpa"
    """Attention implementation of the teacher; the flash ones need the package flash-attn and a GPU."""
    trust_remote_code: bool = False
    """Run Python code that ships with the teacher's checkpoint."""
    mode: Literal["pool", "local", "cache"] = "pool"
    """`pool`: Ray actors of its own. `local`: inside every student worker (small teachers, debugging). `cache`: no teacher at
    all, only what `taid-ray cache warm` left in `cache.directory`."""
    replicas: Range = Range(min=1, max=1)
    """Whole copies of the teacher in the pool: a number, or `{min: 1, max: 4}` to follow the load: the pool starts with
    the fewest, adds some while requests queue up, and drops them when they are idle."""
    shards: PositiveInt = 1
    """Processes (GPUs) that share one replica by tensor parallelism."""
    cpus_per_shard: Positive = 1.0
    """CPUs reserved for each shard."""
    payload: Payload = "hidden"
    """What the teacher sends per loss position. Exact: `hidden` (final hidden states; logits are rebuilt at the student),
    `logits` (whole vocabulary). Approximate: `hidden_int8`, `hidden_fp8` (a scale per token), `topk` (the likeliest ids)."""
    topk: PositiveInt = 64
    """Ids sent per loss position with `payload: topk`; the mass of all others is sent as one number."""
    max_tokens: PositiveInt = 16384
    """Tokens (rows x length) a replica computes in one forward pass; longer requests are split, rows of like length
    together."""
    window: PositiveInt = 4
    """Requests each student worker keeps in flight ahead of the step that consumes them."""
    window_mib: PositiveInt = 1024
    """Memory (MiB) that the answers of these requests may take; fewer are in flight where this is reached first."""
    hedge_after: NonNegative = 5.0
    """Send a request to another replica too once it takes so many times as long as usual; 0 never does."""
    timeout_s: Positive = 600.0
    """Seconds to wait for the pool to start, or for one answer, before the run stops with an error."""
    idle_timeout_s: Positive = 600.0
    """Seconds without any client after which the pool removes itself from the cluster."""


class LoraConfig(Section):
    rank: PositiveInt = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: BelowOne = 0.0
    """Dropout before the adapters. Above 0 the trajectory depends on the number of workers."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Module names that get an adapter; `all-linear` leaves the head out."""

    @field_validator("target_modules")
    @classmethod
    def _some_modules(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("must not be empty; name modules, or write all-linear")
        return value


class StudentConfig(Section):
    model: Name | None = None
    """Hub name or local directory. May be left out with `init: cut` or `init: scratch` (the teacher's is used)."""
    revision: str | None = None
    """Hub revision of the student."""
    init: Literal["pretrained", "scratch", "cut"] = "pretrained"
    """`pretrained`: load `model`. `scratch`: its architecture, new weights. `cut`: keep `layers` of the teacher."""
    layers: list[Count] | None = None
    """With `init: cut`, the teacher's layers to keep, in this order (for example [0, 4])."""
    architecture: dict[str, Any] = {}
    """With `init: scratch`, values that replace those of the model's config (for example `{num_hidden_layers: 4}`)."""
    resize_to_teacher: bool = False
    """Add mean-initialised rows for token ids only the teacher has, and save the teacher's tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute precision. With bfloat16 DeepSpeed keeps float32 master weights."""
    attention: Attention = "sdpa"
    """Attention implementation of the student; the flash ones need the package flash-attn and a GPU."""
    trust_remote_code: bool = False
    """Run Python code that ships with the student's checkpoint."""
    workers: Range = Range(min=1, max=1)
    """Ray Train workers (one GPU each on a GPU cluster): a number, or `{min: 2, max: 8}` to take as many as the nodes that
    offer `taid_student` have room for, also when they come and go. Batches, learning rate and trajectory do not depend on it."""
    cpus_per_worker: Positive = 1.0
    """CPUs reserved for each worker."""
    timeout_s: Positive = 600.0
    """Seconds (beyond `teacher.timeout_s`) that workers wait for one another before they are restarted from the last
    checkpoint; also how long the run waits for room on the cluster after a failure."""
    max_failures: Count = 10
    """Failures of the workers in a row, without a step between them that had not been reached before, that are survived."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what is sharded over the workers (1 optimizer, 2 + gradients, 3 + weights)."""
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed configuration, passed through (for example `{zero_optimization: {offload_optimizer: ...}}`)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; `RUN/model` holds the merged weights."""

    @field_validator("deepspeed")
    @classmethod
    def _owned_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        unknown = dict.fromkeys(
            (key for key in value if key.startswith("train_")), "train.batch_size or its neighbours"
        )
        for key, instead in (unknown | OWNED_DEEPSPEED_KEYS).items():
            if key in value:
                raise ValueError(f"the DeepSpeed key {key!r} is set by taid-ray; remove it. Set instead: {instead}")
        zero = value.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"the DeepSpeed key 'zero_optimization' must be a mapping (found {zero!r})")
        if "stage" in zero:
            raise ValueError("the DeepSpeed key 'zero_optimization.stage' is set by taid-ray; set student.zero_stage")
        return value

    @model_validator(mode="after")
    def _init_fits(self) -> "StudentConfig":
        if self.init == "pretrained" and not self.model:
            raise ValueError("student.model is missing; name a model, or set student.init to cut or scratch")
        if self.init == "cut" and not self.layers:
            raise ValueError("student.layers is missing; init: cut needs the list of teacher layers to keep")
        if self.init == "cut" and self.model:
            raise ValueError(
                f"student.model is {self.model!r}, but init: cut takes its weights from the teacher; remove it"
            )
        for key in ("revision", "trust_remote_code"):
            if getattr(self, key) and not self.model:
                raise ValueError(
                    f"student.{key} is {getattr(self, key)!r}, but only goes with student.model (found init: {self.init} "
                    f"of the teacher); remove it, or set teacher.{key}"
                )
        if self.init != "cut" and self.layers is not None:
            raise ValueError(f"student.layers only goes with init: cut (found init: {self.init})")
        if self.init != "scratch" and self.architecture:
            raise ValueError(f"student.architecture only goes with init: scratch (found init: {self.init})")
        if self.dtype == "float32" and "flash" in self.attention:
            raise ValueError(
                f"student.attention: {self.attention} computes in bfloat16 only (found student.dtype: float32); set "
                "student.dtype: bfloat16 or student.attention: sdpa"
            )
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError(
                "student.zero_stage: 0 with student.dtype: bfloat16 has no float32 master weights in DeepSpeed; "
                "set student.zero_stage: 1 (the same on one worker) or student.dtype: float32"
            )
        if self.zero_stage < 2 and self.deepspeed.get("zero_optimization", {}).get("overlap_comm"):
            raise ValueError(
                "student.deepspeed: zero_optimization.overlap_comm needs student.zero_stage: 2 or 3 (found "
                f"{self.zero_stage}); remove it"
            )
        return self


class DataConfig(Section):
    train: Name
    """Hub name of a dataset, or a local json / jsonl / parquet / csv / txt file or directory of such files."""
    valid: Name | None = None
    """Validation data, given like `train`. Without it the first `valid_documents` documents of `train` are held out."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of `train` to read (hub datasets)."""
    valid_split: str = "validation"
    """Split of `valid` to read (hub datasets)."""
    valid_documents: PositiveInt = 200
    """How many documents validation uses at most."""
    format: Literal["text", "chat", "prompt_response"] = "text"
    """`text`: plain documents. `chat`: lists of messages. `prompt_response`: one column each."""
    text_column: str = "text"
    """Column of the documents (`format: text`)."""
    messages_column: str = "messages"
    """Column of the message lists, each message with `role` and `content` (`format: chat`)."""
    prompt_columns: Annotated[list[str], Field(min_length=1)] = ["prompt"]
    """Columns joined by a blank line into the prompt, empty ones left out (`format: prompt_response`)."""
    response_column: str = "response"
    """Column of the response (`format: prompt_response`)."""
    chat_template: str | None = None
    """Jinja template, or a file holding one, instead of the tokenizer's own (`format: chat | prompt_response`)."""
    loss_on: Literal["response", "all"] = "response"
    """Which tokens of chat and prompt/response data carry loss; `all` is what the published TAID code trains on."""
    sequence_length: Annotated[Int, Field(ge=2)] = 2048
    """Tokens per row."""
    pack: bool = True
    """Put several documents into one row, without attention between them."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with a chat or prompt/response row longer than `sequence_length`. Plain documents are cut into pieces."""
    streaming: bool = False
    """Read the dataset as a stream instead of preparing it on disk first (large corpora)."""
    block_documents: PositiveInt = 1024
    """Documents are read, shuffled and packed in blocks of this many."""


class LossConfig(Section):
    name: LossName = "taid"
    """The divergence between teacher and student."""
    weight: Unit | None = None
    """Mixing weight of `js` (the teacher's), `skew_forward_kl` and `skew_reverse_kl`; their default is 0.1."""
    sft_weight: Unit = 0.0
    """Share of plain cross-entropy on the labels: loss = (1 - sft_weight) * divergence + sft_weight * cross-entropy."""
    memory_mib: PositiveInt | None = None
    """Memory (MiB) for the logits that exist at the same time, which sets how many positions share a matmul. Default: 128
    on a CPU, 2048 on a GPU."""

    @model_validator(mode="after")
    def _weight_fits(self) -> "LossConfig":
        if self.weight is not None and self.name not in WEIGHTED_LOSSES:
            raise ValueError(f"loss.weight only goes with {', '.join(WEIGHTED_LOSSES)} (found loss.name: {self.name})")
        return self


class ScheduleConfig(Section):
    mode: Literal["adaptive", "normalised", "linear", "constant"] = "adaptive"
    """`adaptive`: the paper's rule. `normalised`: the same with the loss's fall divided by its running size, so that fast and
    slow learning really differ. `linear`: from t_start towards t_end. `constant`: t stays t_start."""
    t_start: Unit = 0.4
    """Interpolation at the first step (the paper: 0.4 for Phi-3, 0.2 for its other pairs)."""
    t_end: Unit = 1.0
    """Where t moves to; 1 is the teacher itself. As in the published code the last step uses the value of two steps before."""
    alpha: Unit = 5e-4
    """Step size of the adaptive rule. What matters is alpha times the number of steps."""
    beta: Unit = 0.99
    """Momentum of the adaptive rule."""
    gain: Positive = 10.0
    """How sharply mode `normalised` tells fast learning from slow."""
    signal: Literal["cross_entropy", "kl"] = "cross_entropy"
    """What the adaptive rule watches: `cross_entropy` as the published code, `kl` as the paper."""

    @model_validator(mode="after")
    def _range(self) -> "ScheduleConfig":
        if self.t_start > self.t_end:
            raise ValueError(f"schedule.t_start = {self.t_start} is above schedule.t_end = {self.t_end}; lower t_start")
        if self.gain != ScheduleConfig.model_fields["gain"].default and self.mode != "normalised":
            raise ValueError(
                f"schedule.gain only goes with mode: normalised (found {self.gain}, mode: {self.mode}); remove it"
            )
        if self.signal == "kl" and self.mode in ("adaptive", "normalised") and self.t_start == 0:
            raise ValueError(
                "schedule.signal: kl needs schedule.t_start > 0, because at t = 0 the first KL is exactly 0"
            )
        return self


class TrainConfig(Section):
    steps: PositiveInt | None = None
    """Optimizer steps. Give either this or `epochs`."""
    epochs: Positive | None = None
    """Passes over the training data. Give either this or `steps`."""
    batch_size: PositiveInt = 64
    """Rows per optimizer step over all workers."""
    micro_batch_size: PositiveInt = 8
    """Rows a worker puts through the model at once; accumulation follows from it."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; cosine and linear end at 0."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    weight_decay: NonNegative = 0.01
    """Weight decay of AdamW, on matrices only (not on biases, norms)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Moment decay rates of AdamW."""
    epsilon: Positive = 1e-8
    """Epsilon of AdamW."""
    max_grad_norm: NonNegative = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    seed: Int = 0
    """Seed of data order and new weights."""
    eval_every: Count = 0
    """Validate every so many steps; 0 validates before and after only."""

    @model_validator(mode="after")
    def _length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            found = "both" if self.steps is not None else "neither"
            raise ValueError(f"give exactly one of train.steps and train.epochs (found {found})")
        return self


class CheckpointConfig(Section):
    every_steps: PositiveInt | None = None
    """Save a checkpoint every so many optimizer steps."""
    every_minutes: Positive | None = 10.0
    """Save a checkpoint every so many minutes; null: never by time. Stopping a run saves one in any case."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    best: Literal["cross_entropy", "kl"] | None = None
    """Also save one at every validation, and keep the one with the lowest of this figure."""
    storage: Name | None = None
    """Where they are kept: a directory that all nodes see, or a URI such as s3://bucket/path; every run has a directory of
    its own in it. Default: RUN/checkpoints."""


class CacheConfig(Section):
    """Teacher outputs that are kept, for later epochs, for other trials of a search, and for later runs."""

    directory: Name | None = None
    """Directory that keeps the teacher's outputs: one that all nodes see, or a local one of each node, in memory if it lies in
    /dev/shm. Default: none are kept."""
    disk_gib: Positive = 50.0
    """Size (GiB) that the directory's samples never exceed; those not used for longest make room."""

    @property
    def on(self) -> bool:
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
        return _home_checked(value)


class TrackingConfig(Section):
    """Where a run's figures go beside its own files and TensorBoard's. All else is said to W&B and MLflow by their own
    environment variables (`WANDB_API_KEY`, `WANDB_MODE`, `MLFLOW_TRACKING_URI` ...), set where `taid-ray` is started."""

    wandb: Name | None = None
    """Project of Weights & Biases that gets the run (needs the package wandb: `pip install 'taid-ray[wandb]'`)."""
    mlflow: Name | None = None
    """Experiment of MLflow that gets the run (needs the package mlflow: `pip install 'taid-ray[mlflow]'`)."""


class DistillConfig(Section):
    """Everything that defines one distillation run."""

    name: str = "distill"
    """Name of the run, used in logs and for the teacher pool."""
    out: Name | None = None
    """Run directory, on a file system that every node sees; `~` is the home directory. Default: runs/NAME."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` takes GPUs if the cluster has any."""
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    cache: CacheConfig = CacheConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if any(not (c.isascii() and (c.isalnum() or c in "-_.")) for c in value):
            raise ValueError("use letters, digits, '-', '_' and '.' only")
        if not value.strip("."):  # `runs/..` is no run directory
            raise ValueError("must not be dots only")
        return value

    @field_validator("out")
    @classmethod
    def _directory(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError(
                "remote storage is not offered yet; name a directory on a file system that every node sees"
            )
        return _home_checked(value)

    @model_validator(mode="after")
    def _fits_together(self) -> "DistillConfig":
        if self.teacher.mode == "local" and (self.teacher.replicas.max, self.teacher.shards) != (1, 1):
            raise ValueError(
                f"teacher.mode: local has one replica and one shard (found replicas: {self.teacher.replicas.max}, "
                f"shards: {self.teacher.shards}); set teacher.mode: pool"
            )
        if self.teacher.mode == "cache" and self.cache.directory is None:
            raise ValueError(
                "teacher.mode: cache reads what `taid-ray cache warm` left in cache.directory, and that is not set; set it, or "
                "set teacher.mode: pool"
            )
        if self.data.streaming and self.train.epochs is not None:
            raise ValueError("train.epochs needs the length of the data, which a stream has not; set train.steps")
        if self.checkpoint.best and not self.train.eval_every:
            raise ValueError(
                f"checkpoint.best: {self.checkpoint.best} compares validations, and train.eval_every is 0; set it"
            )
        if self.train.warmup_steps and self.train.steps and self.train.warmup_steps > self.train.steps:
            raise ValueError(f"train.warmup_steps = {self.train.warmup_steps} exceeds train.steps = {self.train.steps}")
        return self

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run directory."""
        return Path(self.out or f"runs/{self.name}").expanduser().absolute()

    @property
    def effective_schedule(self) -> ScheduleConfig:
        """The schedule of the run: every loss but TAID compares with the teacher itself, which is t = 1 throughout."""
        if self.loss.name == "taid":
            return self.schedule
        return self.schedule.model_copy(update={"mode": "constant", "t_start": 1.0, "t_end": 1.0})

    @property
    def peer_timeout_s(self) -> float:
        """How long workers wait for one another; one of them may be waiting for its teacher."""
        return self.student.timeout_s + self.teacher.timeout_s


def load_config(
    path: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> DistillConfig:
    """Reads a YAML file, applies dotted `key=value` overrides (values are YAML) and validates the result.

    values: dotted keys with values to take literally, set last. Raises ConfigError, naming the file or the dotted key.
    """
    return build_config(read_tree(path), overrides, values)


def build_config(
    tree: Mapping[str, Any], overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> DistillConfig:
    """Validates a nested mapping under overrides and values as in `load_config`.

    Raises ConfigError with one line per problem.
    """
    merged = copy.deepcopy(dict(tree))
    for override in overrides:
        apply_override(merged, override)
    for key, value in (values or {}).items():
        set_key(merged, key, value)
    try:
        return DistillConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(problem, known_keys()) for problem in error.errors())) from None


def stored_config(tree: Mapping[str, Any]) -> DistillConfig:
    """Validates the configuration that a run or a search left in its directory, maybe one of an older version.

    Raises ConfigError. What a removed key said is ignored: cache.memory_gib.
    """
    tree = dict(tree)
    if isinstance(cache := tree.get("cache"), dict):
        tree["cache"] = {key: value for key, value in cache.items() if key != "memory_gib"}
    return build_config(tree)


def known_keys(section: type[Section] = DistillConfig, prefix: str = "") -> dict[str, str]:
    """Every dotted key of the tree with its help text."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        nested = [
            a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type) and issubclass(a, Section)
        ]
        keys |= known_keys(nested[0], f"{prefix}{name}.") if nested else {f"{prefix}{name}": field.description or ""}
    return keys
