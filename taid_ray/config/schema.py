"""The configuration: one typed, frozen tree. The text under each field is its help, and its entry in the key reference.

`load_config` reads YAML plus dotted `key=value` overrides. Everything that can be known to be wrong without opening a
model or a cluster is refused here, with the dotted key, the value found and the remedy.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from taid_ray.config.data import DataConfig
from taid_ray.config.fields import (
    EVALUATED,
    MOVABLE,
    RESUMABLE,
    SETS_ROWS,
    Mark,
    Name,
    Section,
    SharedByTrials,
    home_checked,
)
from taid_ray.config.models import StudentConfig, TeacherConfig
from taid_ray.config.objective import WITHOUT_TOPK, LossConfig, ScheduleConfig
from taid_ray.config.text import apply_override, explain, read_tree, set_key
from taid_ray.config.training import CacheConfig, CheckpointConfig, TrackingConfig, TrainConfig
from taid_ray.errors import ConfigError


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
    teacher: TeacherConfig | None
    """The teacher, with the keys below. `null`: there is none, and the student learns from the data alone (`loss.name: sft`)."""
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
        if self.teacher is None:
            self._needs_no_teacher()
        else:
            self._teacher_fits(self.teacher)
            self._outputs_fit(self.teacher)
            self._loss_fits(self.teacher)
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

    def _loss_fits(self, teacher: TeacherConfig) -> None:
        """Raises ValueError unless the loss goes with what the teacher sends, and with the schedule."""
        name, schedule = self.loss.name, self.schedule
        if teacher.payload == "topk" and (reason := WITHOUT_TOPK.get(name)):
            raise ValueError(
                f"loss.name: {name} does not go with teacher.payload: topk: {reason}; set teacher.payload: hidden, or choose "
                "another loss"
            )
        if name == "taid_reverse_kl" and schedule.mode in ("adaptive", "normalised") and schedule.t_start == 0:
            raise ValueError(
                f"loss.name: taid_reverse_kl needs schedule.t_start > 0 with schedule.mode: {schedule.mode}, because at t = 0 "
                "the first loss is exactly 0 (found schedule.t_start: 0)"
            )

    def _needs_no_teacher(self) -> None:
        """Raises ValueError if a key asks for the teacher, although there is none."""
        student = self.student
        problems = [
            (self.learns_from_teacher, f"loss.name: {self.loss.name} compares the student with it; set loss.name: sft"),
            (
                student.init == "cut",
                "student.init: cut keeps some of its layers; set student.model and init: pretrained",
            ),
            (
                student.init == "scratch" and student.model is None,
                "student.init: scratch takes its architecture where student.model is missing; set student.model",
            ),
            (student.resize_to_teacher, "student.resize_to_teacher takes its tokenizer; remove it"),
            (self.cache.on, "cache.directory keeps its outputs; remove it"),
            (self.checkpoint.best == "kl", "checkpoint.best: kl compares the student with it; set cross_entropy"),
        ]
        for asks, problem in problems:
            if asks:
                raise ValueError(f"teacher: null means that there is no teacher, but {problem}, or give teacher.model")

    def _teacher_fits(self, teacher: TeacherConfig) -> None:
        """Raises ValueError unless the cluster's part of the section fits where the teacher runs."""
        if teacher.mode == "local" and (teacher.replicas.max, teacher.shards) != (1, 1):
            raise ValueError(
                f"teacher.mode: local has one replica and one shard (found replicas: {teacher.replicas.max}, "
                f"shards: {teacher.shards}); set teacher.mode: pool"
            )
        if teacher.mode == "cache" and self.cache.directory is None:
            raise ValueError(
                "teacher.mode: cache reads what `taid-ray cache warm` left in cache.directory, and that is not set; set it, or "
                "set teacher.mode: pool"
            )

    def _outputs_fit(self, teacher: TeacherConfig) -> None:
        """Raises ValueError unless what teacher.mode: file needs is set, and teacher.outputs is set for nothing else."""
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
        elif self.data.has_images:
            raise ValueError(
                "teacher.mode: file does not go with data.images_column: the keys of its samples are of text only; set "
                "teacher.mode to pool, local or cache"
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
    def given_teacher(self) -> TeacherConfig:
        """The teacher of a run that has one, for what has nothing to do without; AssertionError for `teacher: null`."""
        assert self.teacher is not None, "this needs a teacher, and teacher is null"
        return self.teacher

    @property
    def has_pool(self) -> bool:
        """True if the teacher runs in actors of its own."""
        return self.teacher is not None and self.teacher.mode == "pool"

    @property
    def learns_from_teacher(self) -> bool:
        """False for the loss `sft`: a teacher, if there is one, is asked in validations only."""
        return self.loss.name != "sft"

    @property
    def effective_schedule(self) -> ScheduleConfig:
        """The schedule of the run: every loss but TAID compares with the teacher itself, which is t = 1 throughout."""
        if self.loss.is_taid:
            return self.schedule
        return self.schedule.model_copy(update={"mode": "constant", "t_start": 1.0, "t_end": 1.0})

    @property
    def peer_timeout_s(self) -> float:
        """Seconds that workers wait for one another; one of them may be waiting for its teacher."""
        return self.student.timeout_s + (self.teacher.timeout_s if self.teacher else 0.0)


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


def items_of(field: FieldInfo) -> type[Section] | None:
    """Returns the section of each item of a field that may be a list of sections; None for other fields."""
    kinds: list[Any] = [field.annotation]
    for kind in kinds:  # grows as it goes
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind if kind is not field.annotation and section_of(field) is None else None
        kinds += get_args(kind)
    return None


def known_keys(section: type[Section] = DistillConfig, prefix: str = "") -> dict[str, str]:
    """Lists every dotted key with its help text; also those of ranges, of sections that may be null, and of items of lists.

    The latter have `[]` after the list's key.
    """
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}{name}", section_of(field)
        if inner is None or field.description:
            keys[key] = field.description or ""
        if inner is not None:
            keys |= known_keys(inner, f"{key}.")
        elif (items := items_of(field)) is not None:
            keys |= known_keys(items, f"{key}[].")
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
        name, listed, _ = part.partition("[")
        field = section.model_fields.get(name) if section else None
        if field is None:  # a key in a mapping that taid-ray only passes on, or none at all
            break
        own = [mark for mark in field.metadata if isinstance(mark, Mark)]
        # Of a list the keys say for themselves which are paths.
        marks += [mark for mark in own if not (listed and mark is MOVABLE)]
        section = items_of(field) if listed else section_of(field)
    return marks
