"""The sections `teacher` and `student`: the models, and the processes that they run in."""

from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from taid_ray.config.fields import (
    EVALUATED,
    RESUMABLE,
    SETS_RATES,
    SETS_ROWS,
    BelowOne,
    Count,
    Name,
    NonNegative,
    Positive,
    PositiveInt,
    Range,
    Section,
)

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
Payload = Literal["hidden", "hidden_int8", "hidden_fp8", "topk", "logits"]

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


class TeacherConfig(Section):
    """The model that is learned from. Its weights never change."""

    model: Annotated[Name, EVALUATED, SETS_ROWS, SETS_RATES]
    """The teacher: a model name on the Hugging Face hub, or a local directory of such a model."""
    revision: Annotated[str | None, EVALUATED, SETS_ROWS, SETS_RATES] = None
    """Branch, tag or commit of the teacher on the hub; by default its main branch."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], EVALUATED, SETS_RATES] = "auto"
    """Precision of the teacher's weights and of the outputs it sends. `auto` takes the precision of the checkpoint."""
    quantization: Annotated[dict[str, Any], EVALUATED, SETS_RATES] = {}
    """Settings that transformers takes as `quantization_config`, for example
    `{quant_method: bitsandbytes, load_in_4bit: true}`. Empty: the teacher is not quantized."""
    attention: Annotated[Attention, EVALUATED, SETS_RATES] = "auto"
    """Attention implementation of the teacher. `auto` chooses as transformers does: `sdpa`, or `eager` for a model that has no
    `sdpa`. The flash ones need the package flash-attn and a GPU."""
    trust_remote_code: Annotated[bool, EVALUATED] = False
    """Allow Python code that comes with the teacher's checkpoint to run."""
    mode: Annotated[Literal["pool", "local", "cache", "file"], RESUMABLE] = "pool"
    """Where the teacher runs. `pool`: in Ray actors of its own. `local`: inside every student worker (for small teachers and
    for debugging). `cache`: nowhere; every output is read from what `taid-ray cache warm` left in `cache.directory`. `file`:
    nowhere; every output comes from the file `outputs`."""
    outputs: Name | None = None
    """With `mode: file`: a parquet file of the teacher's outputs, which `taid-ray cache export` or another tool wrote. Its
    outputs are copied into `cache.directory` when the run starts."""
    replicas: Annotated[Range, RESUMABLE] = Range(min=1, max=1)
    """Copies of the teacher in the pool: a number, or a range such as `{min: 1, max: 4}`. With a range the pool starts with
    the smallest number, adds replicas while requests queue up, and removes them when they are idle."""
    shards: Annotated[PositiveInt, RESUMABLE, SETS_RATES] = 1
    """Processes (each with a GPU on a GPU cluster) that share one replica by tensor parallelism."""
    cpus_per_shard: Annotated[Positive, RESUMABLE, SETS_RATES] = 1.0
    """CPUs that Ray reserves for each shard."""
    payload: Annotated[Payload, SETS_RATES] = "hidden"
    """What the teacher sends for each position that carries loss. Exact: `hidden`, the final hidden states, from which the
    student's worker computes the logits; `logits`, those of the whole vocabulary. Approximate: `hidden_int8` and
    `hidden_fp8`, hidden states rounded with one scale per token; `topk`, the probabilities of the likeliest tokens."""
    topk: Annotated[PositiveInt, SETS_RATES] = 64
    """Number of token ids sent per position with `payload: topk`. The probability of all others is sent as one number."""
    max_tokens: Annotated[PositiveInt, EVALUATED, RESUMABLE, SETS_RATES] = 16384
    """Tokens (rows x length, padding included) that a replica puts through the model at once. A larger request is computed
    in several parts, with rows of similar length together."""
    window: Annotated[PositiveInt, RESUMABLE] = 4
    """Requests that each student worker sends ahead of the step that needs the answers."""
    window_mib: Annotated[PositiveInt, RESUMABLE] = 1024
    """Largest total size (MiB) of the answers to these requests, per student worker. Where they would take more, fewer are
    sent ahead."""
    hedge_after: Annotated[NonNegative, RESUMABLE] = 5.0
    """A request that has taken this many times as long as usual is sent to a second replica too, in case the first one hangs.
    0 turns this off."""
    timeout_s: Annotated[Positive, RESUMABLE] = 600.0
    """Seconds to wait until the pool has started, and for each answer, before the run stops with an error."""
    idle_timeout_s: Annotated[Positive, RESUMABLE] = 600.0
    """Seconds without any run that uses it after which the pool removes itself from the cluster."""

    @property
    def is_stored(self) -> bool:
        """True if all outputs are there already, so that no teacher is loaded."""
        return self.mode in ("cache", "file")

    def in_flight_bytes(self, answer_bytes: float) -> float:
        """The most that the answers of one worker's requests in flight take, each of `answer_bytes`; one always may be."""
        return min(self.window * answer_bytes, max(self.window_mib * 2**20, answer_bytes))


class LoraConfig(Section):
    """Low-rank adapters, which train instead of the student's own weights. `RUN/model` holds the merged weights."""

    rank: PositiveInt = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: BelowOne = 0.0
    """Dropout in front of the adapters. With a value above 0 the results depend on the number of workers."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the modules that get an adapter. `all-linear`: all linear layers but the head."""

    @field_validator("target_modules")
    @classmethod
    def _some_modules(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("must not be empty; name modules, or write all-linear")
        return value


class StudentConfig(Section):
    """The model that is trained, and the workers that train it."""

    model: Annotated[Name | None, EVALUATED, SETS_ROWS, SETS_RATES] = None
    """The student: a model name on the Hugging Face hub, or a local directory of such a model. Not given with `init: cut`;
    with `init: scratch` the teacher's architecture is used where it is missing."""
    revision: Annotated[str | None, EVALUATED, SETS_ROWS, SETS_RATES] = None
    """Branch, tag or commit of the student on the hub; by default its main branch."""
    init: Annotated[Literal["pretrained", "scratch", "cut"], SETS_RATES] = "pretrained"
    """Where the student's first weights come from. `pretrained`: the weights of `model`. `scratch`: random weights in the
    architecture of `model`, changed by `architecture`. `cut`: the teacher's weights, with only the `layers` named."""
    layers: Annotated[list[Count] | None, SETS_RATES] = None
    """With `init: cut`: the numbers of the teacher's layers to keep, from 0, in the student's order, for example `[0, 4]`."""
    architecture: Annotated[dict[str, Any], SETS_RATES] = {}
    """With `init: scratch`: values that replace those in the model's config.json, for example `{num_hidden_layers: 4}`."""
    resize_to_teacher: Annotated[bool, SETS_ROWS, SETS_RATES] = False
    """Give the student the teacher's tokenizer, and embedding rows for the token ids that only the teacher has. A new row
    starts as the mean of the others. Special tokens may have other names in the student's own tokenizer."""
    dtype: Annotated[Literal["float32", "bfloat16"], EVALUATED, SETS_RATES] = "bfloat16"
    """Precision of the student's computation. With bfloat16 DeepSpeed keeps master weights in float32."""
    attention: Annotated[Attention, EVALUATED, SETS_RATES] = "auto"
    """Attention implementation of the student. `auto` chooses as transformers does: `sdpa`, or `eager` for a model that has no
    `sdpa`. The flash ones need the package flash-attn and a GPU."""
    trust_remote_code: Annotated[bool, EVALUATED] = False
    """Allow Python code that comes with the student's checkpoint to run."""
    workers: Annotated[Range, RESUMABLE] = Range(min=1, max=1)
    """Processes that train the student, each with a GPU on a GPU cluster: a number, or a range such as `{min: 2, max: 8}`. With
    a range the run takes as many as find room on the nodes that offer the resource `taid_student`, also when nodes come and
    go. The results do not depend on it, because batches and learning rate do not."""
    cpus_per_worker: Annotated[Positive, RESUMABLE, SETS_RATES] = 1.0
    """CPUs that Ray reserves for each worker."""
    timeout_s: Annotated[Positive, RESUMABLE] = 600.0
    """Seconds, in addition to `teacher.timeout_s`, that workers wait for one another before all of them restart from the
    last checkpoint. After a failure the run also waits this long for room on the cluster."""
    max_failures: Annotated[Count, RESUMABLE] = 10
    """Number of failures in a row that a run survives. A step that had not been reached before starts the count anew."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], RESUMABLE] = 2
    """DeepSpeed ZeRO stage, which says what is divided among the workers: 0 nothing, 1 the optimizer's state, 2 also the
    gradients, 3 also the weights."""
    deepspeed: Annotated[dict[str, Any], RESUMABLE, SETS_RATES] = {}
    """Further DeepSpeed settings, for example `{zero_optimization: {offload_optimizer: {device: cpu}}}`. Those that taid-ray
    sets itself are refused."""
    gradient_checkpointing: Annotated[bool, RESUMABLE, SETS_RATES] = False
    """Save memory by computing activations a second time in the backward pass."""
    freeze: Annotated[list[Name], SETS_RATES] = []
    """Modules of the student that are not trained, for example `[vision_tower, multi_modal_projector]`: their names in the model,
    or the last parts of these. They take no memory for gradients and for the optimizer."""
    lora: Annotated[LoraConfig | None, SETS_RATES] = None
    """Train low-rank adapters instead of all weights, with the keys below. By default all weights are trained."""

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
        if self.freeze and self.lora is not None:
            raise ValueError(
                f"student.freeze does not go with student.lora (found {self.freeze}): with adapters all of the student's own "
                "weights are frozen anyway; remove one of the two"
            )
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
