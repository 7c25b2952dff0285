"""The configuration: one typed, frozen tree. The text under each field is its help, and its entry in the key reference.

`load_config` reads YAML plus dotted `key=value` overrides. Everything that can be known to be wrong without opening a
model or a cluster is refused here, with the dotted key, the value found and the remedy.
"""

import copy
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from taid_ray.config.fields import (
    EVALUATED,
    MOVABLE,
    RESUMABLE,
    SETS_RATES,
    SETS_ROWS,
    SETS_STEPS,
    TRAINING_ONLY,
    BelowOne,
    Count,
    Int,
    Mark,
    Name,
    NonNegative,
    Positive,
    PositiveInt,
    Range,
    Section,
    SharedByTrials,
    Unit,
    home_checked,
)
from taid_ray.config.text import apply_override, explain, read_tree, set_key
from taid_ray.errors import ConfigError

LossName = Literal["taid", "forward_kl", "reverse_kl", "js", "tvd", "skew_forward_kl", "skew_reverse_kl"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
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
    """The documents to train and to validate on, and how they become rows of tokens."""

    train: Annotated[Name, MOVABLE, TRAINING_ONLY]
    """Training data: the name of a dataset on the Hugging Face hub, a local file (jsonl, json, parquet, csv, tsv, txt or arrow;
    text also compressed as gz, zst or bz2), a directory of such files, a pattern for them such as `corpus/**/part-*.parquet`, or
    what `save_to_disk` of the library datasets wrote."""
    valid: Annotated[Name | None, MOVABLE] = None
    """Validation data, given like `train`. Without it the first `valid_documents` documents of `train` are kept for
    validation, and not trained on."""
    subset: str | None = None
    """Configuration name of a dataset on the hub, or of a local clone of one, where it has several."""
    split: Annotated[str, TRAINING_ONLY] = "train"
    """Split of `train` to read, if it has several. In a local directory the names of files and folders tell their split."""
    valid_split: str = "validation"
    """Split of `valid` to read, if it has several."""
    valid_documents: PositiveInt = 200
    """Largest number of documents that validation uses."""
    format: Annotated[Literal["text", "chat", "prompt_response"], SETS_RATES] = "text"
    """What a row of the data holds. `text`: a document. `chat`: a list of messages. `prompt_response`: a prompt and a
    response, in columns of their own."""
    text_column: str = "text"
    """With `format: text`: the column of the documents."""
    messages_column: str = "messages"
    """With `format: chat`: the column of the message lists. Each message has a `role` and a `content`, or a `from` and a
    `value`. Where it is left at the default, `conversations` and `conversation` are looked for, too. A column `tools` holds the
    tools of each row, if there is one."""
    prompt_columns: Annotated[list[str], Field(min_length=1)] = ["prompt"]
    """With `format: prompt_response`: the columns that make the prompt, joined by a blank line. Empty ones are left out."""
    response_column: str = "response"
    """With `format: prompt_response`: the column of the response. Where it is left at the default, `completion` is looked for,
    too."""
    chat_template: str | None = None
    """Jinja chat template, or the path of a file that holds one, for `format: chat` and `prompt_response`. By default the
    tokenizer's own."""
    loss_on: Annotated[Literal["response", "all"], SETS_RATES] = "response"
    """Which tokens carry loss with `format: chat` and `prompt_response`: those of the responses only, or all, as the published
    TAID code does. With `format: text` all tokens carry loss."""
    turns: Annotated[Literal["all", "last"], SETS_RATES] = "all"
    """Which answers of a conversation carry loss with `format: chat` and `loss_on: response`: all, or the last one only. Where
    the template renders earlier answers differently once more follows (without their reasoning, for example), every answer
    is trained in the form in which it is generated, in a sample that ends with it."""
    date: str | None = None
    """The day that a chat template is told if it asks for today's, for example "2026-11-29" (in quotes). Default: the day
    on which the run began."""
    sequence_length: Annotated[Int, Field(ge=2), SETS_RATES] = 2048
    """Largest number of tokens in a row."""
    pack: Annotated[bool, SETS_RATES] = True
    """Put several documents into one row. They do not attend to one another."""
    overlong: Annotated[Literal["error", "drop", "truncate"], SETS_RATES] = "error"
    """What happens to a document that is longer than `sequence_length`, with `format: chat` and `prompt_response`: the run stops
    with an error, the document is left out, or its end is cut off. With `format: text` it is cut into pieces."""
    streaming: bool = False
    """Read the data as a stream, which may have no end: nothing is counted or encoded before the first step, and a dataset on
    the hub is not prepared on disk. Needs `train.steps`, and shuffles in blocks only (`order: blocks`)."""
    order: Annotated[Literal["global", "blocks"], TRAINING_ONLY] = "global"
    """Order of the training rows. `global`: all documents are encoded once, into the store, and every epoch is a permutation of
    all rows. `blocks`: every worker reads and encodes the documents itself, and they are shuffled within blocks of
    `block_documents` only, so that data sorted by source stay sorted; the default with `streaming`."""
    store: Annotated[Name | None, RESUMABLE, TRAINING_ONLY, SharedByTrials("all trials share the encoded data")] = None
    """With `order: global`: directory of the encoded data, which all nodes must see, or a URI such as s3://bucket/path, whose
    files are copied to each node. Runs and searches on the same data share it. Default: `encoded-data` beside the run
    directory."""
    block_documents: Annotated[PositiveInt, TRAINING_ONLY] = 1024
    """With `order: blocks`: documents are read, shuffled and packed in blocks of this many. Larger blocks shuffle better and need
    more memory."""

    @model_validator(mode="before")
    @classmethod
    def _order_of_stream(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("streaming") is True and "order" not in values:
            return {**values, "order": "blocks"}
        return values

    @field_validator("date")
    @classmethod
    def _day(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                return datetime.date.fromisoformat(value).isoformat()
            except ValueError:
                raise ValueError('must be a day such as "2026-11-29"') from None
        return value

    @model_validator(mode="after")
    def _turns_fit(self) -> "DataConfig":
        if self.turns == "last" and self.loss_on == "all":
            raise ValueError("data.turns: last goes with data.loss_on: response (found data.loss_on: all)")
        if self.streaming and self.order == "global":
            raise ValueError(
                "data.order: global needs data with an end; remove it, or data.streaming: true (order: blocks)"
            )
        return self


class LossConfig(Section):
    """The loss that the student minimises."""

    name: Annotated[LossName, SETS_RATES] = "taid"
    """The divergence between teacher and student, per token. `taid` is the only one that uses the section `schedule`."""
    weight: Unit | None = None
    """Mixing weight of `js` (the teacher's share), `skew_forward_kl` and `skew_reverse_kl`. Default: 0.1."""
    sft_weight: Unit = 0.0
    """Share of plain cross-entropy on the data's own tokens:
    loss = (1 - sft_weight) * divergence + sft_weight * cross-entropy."""
    memory_mib: Annotated[PositiveInt | None, RESUMABLE, SETS_RATES] = None
    """Memory (MiB) for the logits that exist at the same time. It sets how many positions the loss treats at once. Default:
    128 on a CPU, 2048 on a GPU."""

    @model_validator(mode="after")
    def _weight_fits(self) -> "LossConfig":
        if self.weight is not None and self.name not in WEIGHTED_LOSSES:
            raise ValueError(f"loss.weight only goes with {', '.join(WEIGHTED_LOSSES)} (found loss.name: {self.name})")
        return self


class ScheduleConfig(Section):
    """Course of TAID's interpolation t during a run, between the student (0) and the teacher (1)."""

    mode: Literal["adaptive", "normalised", "linear", "constant"] = "adaptive"
    """`adaptive`: the paper's rule, which moves t faster while the loss falls. `normalised`: the same rule with the fall of the
    loss divided by its usual size, so that fast and slow learning really differ. `linear`: from t_start towards t_end.
    `constant`: t stays at t_start."""
    t_start: Unit = 0.4
    """Value of t at the first step. The paper uses 0.4 for Phi-3, and 0.2 for its other pairs."""
    t_end: Unit = 1.0
    """Value that t moves to; 1 is the teacher itself. As in the published code the last step uses the value of two steps
    before, so that a linear schedule ends just below it."""
    alpha: Unit = 5e-4
    """Step size of the adaptive rule. What matters is alpha times the number of steps, so a short run needs a larger one."""
    beta: Unit = 0.99
    """Momentum of the adaptive rule: how slowly its average of the loss's fall changes."""
    gain: Positive = 10.0
    """With `mode: normalised`: how strongly t reacts to the difference between fast and slow learning."""
    signal: Literal["cross_entropy", "kl"] = "cross_entropy"
    """The loss that the adaptive rule watches: `cross_entropy`, as in the published code, or `kl`, as in the paper."""

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


class DistillConfig(Section):
    """Everything that defines one distillation run."""

    name: Annotated[str, RESUMABLE, SharedByTrials("the search names its trials")] = "distill"
    """Name of the run, in its logs and of its teacher pool."""
    out: Annotated[
        Name | None, RESUMABLE, SharedByTrials("every trial has a directory of its own inside the search's")
    ] = None
    """Run directory (RUN), which all files of the run go to. It must lie on a file system that every node sees; `~` is the home
    directory. Default: `runs/NAME`."""
    device: Annotated[
        Literal["auto", "cpu", "cuda"], EVALUATED, SharedByTrials("all trials run on the same kind of device")
    ] = "auto"
    """Where the models run: `auto` uses GPUs if the cluster has any."""
    teacher: TeacherConfig
    student: StudentConfig
    data: Annotated[DataConfig, EVALUATED, SETS_ROWS]
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    cache: Annotated[CacheConfig, RESUMABLE, SharedByTrials("all trials share the teacher's outputs")] = CacheConfig()
    tracking: Annotated[TrackingConfig, RESUMABLE] = TrackingConfig()

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
        return home_checked(value)

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
        self._outputs_fit()
        if self.data.streaming and self.train.epochs is not None:
            raise ValueError(
                "train.epochs needs the length of the data, which is not known for a stream; set train.steps"
            )
        if self.checkpoint.best and not self.train.eval_every:
            raise ValueError(
                f"checkpoint.best: {self.checkpoint.best} compares validations, and train.eval_every is 0; set it"
            )
        if self.train.warmup_steps and self.train.steps and self.train.warmup_steps > self.train.steps:
            raise ValueError(f"train.warmup_steps = {self.train.warmup_steps} exceeds train.steps = {self.train.steps}")
        return self

    def _outputs_fit(self) -> None:
        """Raises ValueError unless what teacher.mode: file needs is set, and teacher.outputs is set for nothing else."""
        teacher = self.teacher
        if teacher.mode != "file":
            if teacher.outputs is not None:
                raise ValueError(
                    f"teacher.outputs goes with teacher.mode: file (found teacher.mode: {teacher.mode}); set that, or remove it"
                )
        elif teacher.outputs is None:
            raise ValueError(
                "teacher.mode: file reads the file teacher.outputs, and that is not set; name a parquet file"
            )
        elif teacher.payload != "topk":
            raise ValueError(
                f"teacher.mode: file has the likeliest ids of every position (found teacher.payload: {teacher.payload}); set "
                "teacher.payload: topk, and teacher.topk to the number of ids in the file"
            )
        elif self.cache.directory is None:
            raise ValueError(
                "teacher.mode: file copies the outputs into cache.directory, where the workers find them, and that is not set; "
                "name a directory that all nodes see"
            )

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run directory."""
        return Path(self.out or f"runs/{self.name}").expanduser().absolute()

    @property
    def data_store(self) -> str:
        """Directory or URI of the encoded data, see `data.store`."""
        return self.data.store or str(self.run_dir.parent / "encoded-data")

    @property
    def effective_schedule(self) -> ScheduleConfig:
        """The schedule of the run: every loss but TAID compares with the teacher itself, which is t = 1 throughout."""
        if self.loss.name == "taid":
            return self.schedule
        return self.schedule.model_copy(update={"mode": "constant", "t_start": 1.0, "t_end": 1.0})

    @property
    def peer_timeout_s(self) -> float:
        """Seconds that workers wait for one another; one of them may be waiting for its teacher."""
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
    """Validates a nested mapping, changed by overrides and values as in `load_config`.

    Raises ConfigError with one line per problem, also if `tree` is no mapping.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"expected a mapping of sections (teacher, student, data, ...), found {tree!r:.80}")
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

    Raises ConfigError. What a removed key said is ignored: cache.memory_gib. Before there was data.order all runs had `blocks`.
    """
    if isinstance(tree, Mapping) and isinstance(cache := tree.get("cache"), dict):
        tree = {**tree, "cache": {key: value for key, value in cache.items() if key != "memory_gib"}}
    if isinstance(tree, Mapping) and isinstance(data := tree.get("data"), dict):
        tree = {**tree, "data": {"order": "blocks", **data}}
    return build_config(tree)


def section_of(field: FieldInfo) -> type[Section] | None:
    """Returns the section that a field holds, perhaps beside null; None for a field with a value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def known_keys(section: type[Section] = DistillConfig, prefix: str = "") -> dict[str, str]:
    """Lists every dotted key with its help text; also those of ranges and of sections that may be null."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}{name}", section_of(field)
        if inner is None or field.description:
            keys[key] = field.description or ""
        if inner is not None:
            keys |= known_keys(inner, f"{key}.")
    return keys


def same_meaning(key: str, before: Any, now: Any) -> bool:
    """Tells whether two values of a dotted key mean the same. `attention: auto` is `sdpa` for every model that has both.

    `sdpa` was the default before there was `auto`, and is in the config.yaml of older runs. `data.date: null` is whatever day
    the run has.
    """
    alike = key.endswith(".attention") and {before, now} == {"auto", "sdpa"}
    undated = key == "data.date" and None in (before, now)
    return bool(before == now or alike or undated)


def marks_of(key: str) -> list[Mark]:
    """Lists the marks of a dotted key: those of its field, and of every section on the way to it."""
    marks: list[Mark] = []
    section: type[Section] | None = DistillConfig
    for part in key.split("."):
        field = section.model_fields.get(part) if section else None
        if field is None:  # a key in a mapping that taid-ray only passes on, or none at all
            break
        marks += [mark for mark in field.metadata if isinstance(mark, Mark)]
        section = section_of(field)
    return marks
