"""The inputs of a plan: a configuration, its models' configs and the hardware, with the sizes that follow from them."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch

from taid_ray.config.models import Payload
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batching import num_micro_batches
from taid_ray.distributed.device import loss_memory_mib
from taid_ray.errors import ConfigError
from taid_ray.losses.objective import SFT, SPARING
from taid_ray.models.lengths import check_lengths
from taid_ray.models.loading import check_causal_lm, check_divisible
from taid_ray.models.pair import model_configs, shared_vocabulary
from taid_ray.models.student_init import check_student, origin
from taid_ray.plan.hardware import Hardware
from taid_ray.plan.images import RowImages
from taid_ray.plan.sizes import Activations, LossShape, ModelShape
from taid_ray.plan.time import FLOAT32, StepWorkload, TokenFlops, backward_flops, body_flops, loss_flops
from taid_ray.plan.trace import Pass, shape_of, trace, trace_tower
from taid_ray.teacher.payload import bytes_per_token, needs_head


@dataclass(frozen=True)
class Models:
    """The two transformers configs of a run."""

    teacher: Any
    """None without a teacher."""
    student: Any
    num_shared: int
    """Token ids that both models share."""


def read_models(config: DistillConfig) -> Models:
    """Reads configs and tokenizers, no weights. Raises ConfigError or ModelError as `taid-ray check` does."""
    teacher, student = model_configs(config)
    if config.teacher:
        check_causal_lm(teacher, "teacher.model", config.data.has_images)
        check_divisible(teacher, config.teacher.shards)
    check_causal_lm(student, "student.model", config.data.has_images)
    check_student(config, student)
    check_lengths(config, teacher, student)
    vocabulary = shared_vocabulary(config, teacher, student)
    if vocabulary.student_rows > student.get_text_config().vocab_size:
        student.get_text_config().vocab_size = vocabulary.student_rows
    return Models(teacher, student, vocabulary.num_shared)


def check_device(config: DistillConfig, hardware: Hardware) -> None:
    """Raises ConfigError where the key `device` names the other kind of hardware."""
    if config.device == "cpu" and not hardware.is_cpu:
        raise ConfigError(f"device: cpu contradicts --gpu {hardware.name}; plan with --gpu cpu, or set device: auto")
    if config.device == "cuda" and hardware.is_cpu:
        raise ConfigError("device: cuda contradicts --gpu cpu; name a GPU, or set device: auto")


@dataclass(frozen=True)
class PlanInputs:
    """A configuration, its models and the hardware. Properties are of one worker, the one with most to do, unless they say
    otherwise."""

    config: DistillConfig
    models: Models
    hardware: Hardware
    images: RowImages | None = None
    """The images of each row, in a run with images."""

    @property
    def mode(self) -> str:
        """Place where the teacher computes: the value of teacher.mode; `cache` also for a file, whose outputs go there; `none`
        without a teacher."""
        if self.config.teacher is None:
            return "none"
        return "cache" if self.config.teacher.is_stored else self.config.teacher.mode

    @property
    def asks_teacher(self) -> bool:
        """True if training asks a teacher; with the loss `sft` validations alone do, or nobody."""
        return self.config.learns_from_teacher

    @property
    def workers(self) -> int:
        """Student workers: the fewest, because then each needs most."""
        return self.config.student.workers.min

    @property
    def student_bytes(self) -> int:
        """Bytes per element of the student's compute dtype."""
        return 2 if self.config.student.dtype == "bfloat16" else 4

    @cached_property
    def teacher_bytes(self) -> int:
        """Bytes per element of the teacher's weights and of what it sends."""
        kept: str = self.config.given_teacher.dtype
        if kept == "auto":
            kept = str(self.models.teacher.get_text_config().dtype).removeprefix("torch.")
        return 2 if kept in ("bfloat16", "float16") else 4

    @cached_property
    def student(self) -> ModelShape:
        """Sizes of the student, adapters included."""
        config, student = self.config, self.config.student
        remote_code = origin(config).trust_remote_code
        return shape_of(self.models.student, student.lora, remote_code, config.data.has_images, student.freeze)

    @cached_property
    def teacher(self) -> ModelShape:
        """Sizes of the whole teacher. Only where there is one."""
        remote_code = self.config.given_teacher.trust_remote_code
        return shape_of(self.models.teacher, None, remote_code, self.config.data.has_images)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a worker per optimizer step."""
        train = self.config.train
        return num_micro_batches(train.batch_size, train.micro_batch_size, self.workers)

    @cached_property
    def workload(self) -> StepWorkload:
        """Work of one optimizer step of the whole run."""
        train = self.config.train
        sharers = self.workers if self.config.student.zero_stage else 1
        return StepWorkload(
            rows=train.batch_size,
            worker_rows=math.ceil(train.batch_size / self.workers),
            requests=self.workers * self.accumulation,
            length=self.config.data.sequence_length,
            vocabulary=self.models.num_shared,
            trained_per_worker=self.student.trained / sharers,
        )

    @property
    def micro_rows(self) -> int:
        """Rows of the largest micro-batch."""
        return math.ceil(self.workload.worker_rows / self.accumulation)

    @cached_property
    def wire_bytes(self) -> dict[str, int]:
        """Bytes per loss position of every payload. Only where there is a teacher."""
        size, shared, k = self.teacher.hidden_size, self.models.num_shared, self.config.given_teacher.topk
        return {kind: bytes_per_token(kind, size, shared, k, self.teacher_bytes) for kind in get_args(Payload)}

    @cached_property
    def loss(self) -> LossShape:
        """The loss of one micro-batch."""
        teacher, loss = self.config.teacher, self.config.loss
        payload = teacher.payload if teacher else None
        mib = loss.memory_mib or loss_memory_mib(torch.device("cpu" if self.hardware.is_cpu else "cuda"))
        return LossShape(
            tokens=self.micro_rows * self.workload.length,
            vocabulary=self.models.num_shared,
            memory_bytes=mib * 2**20,
            payload=payload,
            teacher_hidden=self.teacher.hidden_size if teacher else 0,
            teacher_dtype_bytes=self.teacher_bytes if teacher else 0,
            closed_form=loss.method in (*SPARING, SFT) or payload == "topk",
        )

    @property
    def answer_bytes(self) -> float:
        """Bytes of the answer to one request, every position of which carries loss; 0 without a teacher."""
        teacher = self.config.teacher
        return float(self.loss.tokens * self.wire_bytes[teacher.payload]) if teacher else 0.0

    @property
    def logits_bytes(self) -> float:
        """Bytes of the logits of all positions of one request, in float32."""
        return float(FLOAT32 * self.loss.tokens * self.workload.vocabulary)

    @property
    def in_flight_bytes(self) -> float:
        """Bytes of the answers to one worker's requests in flight, at most."""
        teacher = self.config.teacher
        return teacher.in_flight_bytes(self.answer_bytes) if teacher else 0.0

    @property
    def image_bytes(self) -> float:
        """Bytes of the images of one request; 0 in a run without images."""
        return self.micro_rows * self.images.row_bytes if self.images else 0.0

    @property
    def images_in_flight_bytes(self) -> float:
        """Bytes of the images of one worker's requests in flight, at most."""
        return self.config.teacher.window * self.image_bytes if self.config.teacher else 0.0

    @property
    def window(self) -> int:
        """Requests that a worker keeps in flight, or batches that it has ready where training asks no teacher."""
        return int(self.in_flight_bytes / self.answer_bytes) if self.asks_teacher else 1

    @property
    def on_device_bytes(self) -> float:
        """Bytes of the answers on a worker's device: with a GPU and no cache all that have arrived, else the one in use.

        On a CPU a pool's answers stay in the object store.
        """
        if self.mode != "pool" or self.config.cache.on:
            return self.answer_bytes
        return 0.0 if self.hardware.is_cpu else self.answer_bytes + self.in_flight_bytes

    @property
    def flops(self) -> TokenFlops:
        """Operations per token."""
        student, config = self.student, self.config
        length, packed = self.workload.length, config.data.pack
        rebuilt = self.asks_teacher and needs_head(config.given_teacher.payload)
        forward = body_flops(student.matmul, student.layers, student.attention_width, length, packed)
        backward = backward_flops(
            student.matmul, student.matmul_trained, student.layers, student.attention_width, length, packed
        )
        if self.images is not None:
            learnt, patches = student.vision_trained, self.images.per_row * self.images.student.patches / length
            forward += patches * body_flops(student.vision, 0, 0, 0, False)
            backward += patches * backward_flops(learnt, learnt, 0, 0, 0, False)
        return TokenFlops(
            teacher=self._teacher_flops() if self.asks_teacher else 0.0,
            forward=forward,
            backward=backward,
            recompute=forward if config.student.gradient_checkpointing else 0.0,
            loss=loss_flops(
                self.models.num_shared,
                student.hidden_size,
                self.teacher.hidden_size if rebuilt else None,
                student.head_trained,
            ),
        )

    def _teacher_flops(self) -> float:
        """Counts the teacher's operations per token, for topk and logits its head included."""
        teacher, rebuilt = self.teacher, needs_head(self.config.given_teacher.payload)
        length, packed = self.workload.length, self.config.data.pack
        own_head = 0.0 if rebuilt else 2.0 * self.models.num_shared * teacher.hidden_size
        if self.images is not None and self.images.teacher is not None:
            patches = self.images.per_row * self.images.teacher.patches / length
            own_head += patches * body_flops(teacher.vision, 0, 0, 0, False)
        return body_flops(teacher.matmul, teacher.layers, teacher.attention_width, length, packed) + own_head

    def student_activations(self, checkpointing: bool) -> Activations:
        """Traces the student's pass over one micro-batch, its images included where `towers_traced`. Takes seconds."""
        traced = self._student_pass(checkpointing)
        language, tower = trace(self.models.student, traced), self._student_towers[checkpointing]
        return language if tower is None else language.after(tower)

    def teacher_activations(self) -> Activations:
        """Traces one forward pass of the whole teacher, as `student_activations`. Takes seconds."""
        language, tower = trace(self.models.teacher, self._teacher_pass), self._teacher_tower
        return language if tower is None else language.after(tower)

    @property
    def towers_traced(self) -> dict[str, bool]:
        """Tells of each model that is shown images, and whose memory is planned, whether its vision tower could be traced."""
        if self.images is None:
            return {}
        found = {"student": self._student_towers[False] is not None}
        return found | ({"teacher": self._teacher_tower is not None} if self.mode in ("pool", "local") else {})

    def _student_pass(self, checkpointing: bool) -> Pass:
        student = self.config.student
        return Pass(
            rows=self.micro_rows,
            length=self.workload.length,
            dtype=_dtype(self.student_bytes),
            attention=student.attention,
            checkpointing=checkpointing,
            lora=student.lora,
            trust_remote_code=origin(self.config).trust_remote_code,
            images=self.config.data.has_images,
            freeze=tuple(student.freeze),
        )

    @property
    def _teacher_pass(self) -> Pass:
        teacher = self.config.given_teacher
        return Pass(
            rows=min(self.micro_rows, max(1, teacher.max_tokens // self.workload.length)),
            length=self.workload.length,
            dtype=_dtype(self.teacher_bytes),
            attention=teacher.attention,
            learns=False,
            trust_remote_code=teacher.trust_remote_code,
            key="teacher.model",
            images=self.config.data.has_images,
        )

    @cached_property
    def _student_towers(self) -> dict[bool, Activations | None]:
        """Activations of the student's vision tower, by gradient checkpointing; None without images or where none are known."""
        if self.images is None:
            return {False: None, True: None}
        pixels = self.images.student.of(self.micro_rows, self.images.per_row)
        return {each: trace_tower(self.models.student, self._student_pass(each), pixels) for each in (False, True)}

    @cached_property
    def _teacher_tower(self) -> Activations | None:
        """Activations of the teacher's vision tower; None without images, and where they are not known."""
        if self.images is None or self.images.teacher is None:
            return None
        pixels = self.images.teacher.of(self._teacher_pass.rows, self.images.per_row)
        return trace_tower(self.models.teacher, self._teacher_pass, pixels)


def _dtype(itemsize: int) -> torch.dtype:
    return torch.bfloat16 if itemsize == 2 else torch.float32
