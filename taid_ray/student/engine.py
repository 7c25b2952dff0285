"""The student: a Hugging Face causal language model in a DeepSpeed engine, trained from hidden states.

Body and loss both run inside `engine(...)`, the loss inside the head module's own forward. Under ZeRO-3 that is the
only place where the head's weight is whole (outside it has shape (0,), and tied heads would train silently wrong).
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from taid_ray.checkpoint.restore import Checkpoint
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import Batch
from taid_ray.distributed.device import loss_memory_mib
from taid_ray.distributed.world import World
from taid_ray.errors import NonFiniteLossError
from taid_ray.losses.chunked import LossParts, Scores, Target, chunk_tokens_for, chunked_loss, chunked_scores
from taid_ray.losses.learned_temperature import LearnedTemperature, reversal_strength
from taid_ray.losses.objective import Objective
from taid_ray.losses.projection import LogitTransform, Projection
from taid_ray.models.adapters import add_lora, idle_adapters
from taid_ray.models.freezing import freeze_unreached
from taid_ray.models.head import Head, head_of, hidden_states
from taid_ray.models.precision import train_as_reloaded
from taid_ray.models.probes import attention_that_runs
from taid_ray.models.saving import check_saving, dtypes_when_reloaded, save_model, saved_tensors
from taid_ray.student.clock import PhaseClock
from taid_ray.student.decay import decay_groups
from taid_ray.student.objective import learned_temperature, objective_of, temperature_group
from taid_ray.student.pixels import BatchInputs
from taid_ray.student.state import load_optimizer, load_weights, trained_parameters, training_state
from taid_ray.teacher.payload import TeacherOutput, divergence, row_means

HeadFunction = Callable[[Tensor, Tensor, Tensor | None], Any]


class LossInHead(nn.Module):
    """Runs `function(hidden [N, H], head weight [V, H], head bias)` inside the model's head module."""

    def __init__(self, model: nn.Module, causal_lm: Any, temperature: LearnedTemperature | None):
        super().__init__()
        self.model = model
        self.temperature = temperature  # `function` may call it: its parameter is trained with the model's
        self.causal_lm = [causal_lm]  # in a list: with LoRA it is a part of `model` and must not be registered twice
        patch_head_forward(causal_lm.get_output_embeddings())

    def forward(self, inputs: dict[str, Tensor], loss_positions: Tensor, function: HeadFunction) -> Any:
        causal_lm = self.causal_lm[0]
        hidden = hidden_states(causal_lm, inputs).flatten(0, 1)[loss_positions]
        return causal_lm.get_output_embeddings()(hidden, function)


def patch_head_forward(head: Any) -> None:
    """Gives a head module's forward an optional function of (hidden, whole weight, bias) to run instead of a matmul."""
    plain = head.forward
    adapters = getattr(head, "lora_A", None)

    def forward(hidden: Tensor, function: HeadFunction | None = None) -> Any:
        if function is None:
            return plain(hidden)
        base = head.base_layer if adapters else head
        weight = base.weight
        if adapters:  # an adapted head is W + s B A; get_delta_weight keeps the graph to A and B
            weight = weight + head.get_delta_weight("default")
        return function(hidden, weight, base.bias)

    head.forward = forward
    if adapters:  # ZeRO-3 gathers a module's own parameters only; these belong to the head's children
        for parameter in head.parameters():
            deepspeed.zero.register_external_parameter(head, parameter)


class Student:
    """One rank's part of the student: forward pass with the loss, backward pass, optimizer step, saving."""

    def __init__(
        self,
        config: DistillConfig,
        model: Any,
        num_shared: int,
        world: World,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
        images: BatchInputs | None = None,
    ):
        """Wraps `model` (on CPU, float32). All ranks must pass identical weights.

        num_shared: vocabulary ids that teacher and student share; the loss sees these rows of the head only.
        checkpoint: one to continue from. images: what makes model inputs of batches, in a run with images.
        """
        self.world, self.config, self.num_shared, self.device = world, config, num_shared, device
        self.clock = PhaseClock(device)
        """Measures where a step's time goes; loop and prefetcher use it too."""
        self.source_names = [source.label for source in config.data.sources]
        """Names of the sources of the training data, by their numbers."""
        self.teacher_head: Head | None = None
        """The teacher's head on this device; must be set where its payload carries hidden states."""
        self.transform: LogitTransform = head_of(model).transform
        self.causal_lm = model
        self.num_parameters = int(model.num_parameters())
        self.images = images
        self.unreached = self._freeze_unreached()
        """Names of parameters that are not trained, because the student computes past them when it sees an image."""
        if config.student.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        dtypes = dtypes_when_reloaded(config, model)
        self.trained = add_lora(model, config.student.lora, config.train.seed) if config.student.lora else model
        self.idle_adapters = idle_adapters(model) if config.student.lora else []
        """Names of modules whose adapters the computation does not go through, so that they are not trained."""
        self.trained.train()
        check_saving(config, model, self.trained)
        if config.student.dtype != "float32":
            train_as_reloaded(self.trained, dtypes)
        self.learned = learned_temperature(config)
        """The temperature of the loss, if it is learned."""
        self.parameters = trained_parameters(self.trained)
        if self.learned is not None:
            self.parameters["loss.temperature"] = self.learned.offset
        if checkpoint is not None:
            load_weights(self.parameters, checkpoint.tensor)
        self._temperature = torch.tensor(config.loss.fixed_temperature)
        self._strength = 1.0
        self.grad_norm = 0.0
        self.clips_itself = config.student.zero_stage == 0
        memory_mib = config.loss.memory_mib or loss_memory_mib(device)
        self.chunk_tokens = chunk_tokens_for(num_shared, memory_mib * 2**20)
        self.engine, *_ = deepspeed.initialize(
            model=LossInHead(self.trained, model, self.learned).to(device),
            optimizer=self._optimizer(),
            config=deepspeed_config(config),
        )
        if checkpoint is not None:
            load_optimizer(self.engine, self.parameters, checkpoint.tensor, checkpoint.result.step, world)

    def _freeze_unreached(self) -> list[str]:
        """Freezes what an image's way does not lead through; returns the names. With adapters all else is frozen anyway."""
        if self.images is None or self.config.student.lora is not None:
            return []
        with attention_that_runs(self.causal_lm, torch.device("cpu")):
            return freeze_unreached(self.causal_lm, hidden_states(self.causal_lm, self.images.blank()))

    def _optimizer(self) -> torch.optim.Optimizer:
        """Makes the optimizer of all that is trained."""
        train = self.config.train
        optimizer = torch.optim.AdamW(
            [*decay_groups(self.trained, train.weight_decay), *temperature_group(self.config, self.learned)],
            lr=train.learning_rate,
            betas=train.betas,
            eps=train.epsilon,
            fused=True,
        )
        if self.clips_itself:
            # ZeRO 0 hands clipping to a helper that keeps no norm; this hook runs after the gradients are reduced.
            optimizer.register_step_pre_hook(self._clip)
        return optimizer

    def reseed(self, step: int) -> None:
        """Seeds the random numbers of an optimizer step (dropout) from (seed, step, rank) and nothing else."""
        torch.manual_seed(random.Random(f"{self.config.train.seed}/{step}/{self.world.rank}").getrandbits(63))

    def begin_step(self, step: int, total_steps: int) -> None:
        """Prepares an optimizer step, from 1: random numbers, and how strongly a learned temperature is pulled."""
        self.reseed(step)
        learned = self.config.loss.learned_temperature
        self._strength = reversal_strength(step, learned.ramp * total_steps) if learned else 0.0

    def forward(self, batch: Batch, teacher_output: TeacherOutput | None, t: float) -> tuple[Tensor, LossParts]:
        """The loss at interpolation `t`, summed over this micro-batch's loss positions, and its detached parts.

        teacher_output: None with `loss.name: sft`.
        """
        objective = objective_of(self.config.loss, t)
        teacher, labels = self._target(batch, teacher_output)
        groups = None
        if len(self.source_names) > 1:
            groups = one_hot(batch.sources, len(self.source_names)).to(self.device, torch.float64, non_blocking=True)

        def compute(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> tuple[Tensor, LossParts]:
            with self.clock.phase("loss"):
                projection = self._projection(hidden, head_weight, head_bias)
                return chunked_loss(
                    self._at_temperature(objective),
                    projection,
                    teacher,
                    labels,
                    chunk_tokens=self.chunk_tokens,
                    groups=groups,
                )

        total, parts = self._run(batch, compute)
        return total, parts

    @torch.no_grad()
    def score(self, batch: Batch, teacher_output: TeacherOutput | None) -> Scores:
        """Validation sums of this micro-batch. Collective under ZeRO-3: every rank must call it equally often.

        teacher_output: None if there is no teacher.
        """
        teacher, labels = self._target(batch, teacher_output)

        def compute(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> Scores:
            student = self._projection(hidden, head_weight, head_bias)
            return chunked_scores(student, teacher, labels, chunk_tokens=self.chunk_tokens)

        self.engine.eval()
        scores: Scores = self._run(batch, compute)
        self.engine.train()
        return scores

    @torch.no_grad()
    def seeing(self, batch: Batch, without: Batch) -> list[float]:
        """Measures how far other images change what the student predicts, see `student.seeing`.

        without: the same rows with other images. Returns for each row the mean over its loss positions of KL(own images ||
        others) in nats, over the shared ids; 0.0 for a row that has none. Collective under ZeRO-3.
        """

        def compute(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> Tensor:
            return divergence(Head(head_weight, head_bias, self.transform).rows(self.num_shared), seen, hidden)

        self.engine.eval()
        seen = self._run(batch, lambda hidden, weight, bias: hidden)
        found = self._run(without, compute)
        self.engine.train()
        return row_means(found, batch.loss_positions, batch.inputs["input_ids"].shape)

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H] of model inputs, ids [B, T], without dropout. Collective under ZeRO-3."""
        rows, length = inputs["input_ids"].shape
        everywhere = torch.arange(rows * length, device=self.device)
        self.engine.eval()
        hidden: Tensor = self.engine(inputs, everywhere, lambda hidden, weight, bias: hidden)
        self.engine.train()
        return hidden.view(rows, length, -1)

    def backward(self, loss: Tensor) -> None:
        """Adds this rank's share of a loss that is SUMMED over ranks (DeepSpeed averages, so undo its 1 / size)."""
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """One optimizer step. Returns the global gradient norm before clipping.

        Raises NonFiniteLossError if that is not finite: DeepSpeed would drop the step and go on.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)
        self.engine.step()
        return self.grad_norm if self.clips_itself else finite_norm(float(self.engine.get_global_grad_norm()))

    def state(self) -> Iterator[tuple[str, Tensor | None]]:
        """Weights and optimizer state of a checkpoint, see state.training_state. Collective."""
        return training_state(self.engine, self.parameters, self.world)

    def save(self, state: dict[str, Tensor], directory: Path) -> None:
        """Writes a Hugging Face model directory (adapters merged). For rank 0. state: see `gathered_state`."""
        save_model(self.config, self.causal_lm, state, directory)

    def gathered_state(self) -> dict[str, Tensor]:
        """Parameters and saved buffers of the trained model, whole, on rank 0's CPU; {} elsewhere. Collective under ZeRO-3."""
        state = {}
        for name, tensor in saved_tensors(self.trained).items():
            partitioned = self.config.student.zero_stage == 3 and isinstance(tensor, nn.Parameter)
            with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned):
                if self.world.is_main:
                    state[name] = tensor.detach().cpu().clone()
        return state

    @property
    def temperature(self) -> float:
        """The temperature of the loss in the last forward pass. Waits for the device."""
        return float(self._temperature)

    def prepare(self, batch: Batch) -> None:
        """Begins with what can be done for a batch before it is computed. For the one that is computed next."""
        if self.images is not None:
            self.images.prepare(batch)

    def _run(self, batch: Batch, function: HeadFunction) -> Any:
        inputs, loss_positions = batch.inputs, batch.loss_positions
        if self.images is not None:
            inputs, loss_positions = self.images.of(batch)
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        return self.engine(inputs, loss_positions.to(self.device), function)

    def _target(self, batch: Batch, teacher_output: TeacherOutput | None) -> tuple[Target | None, Tensor]:
        """The teacher's side of the loss, and the labels, on this device."""
        labels = batch.labels.to(self.device, non_blocking=True)
        if teacher_output is None:
            return None, labels
        return teacher_output.to(self.device).target(self.teacher_head), labels

    def _projection(self, hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> Projection:
        """The student's side of the loss, cut to the shared vocabulary."""
        if head_weight.shape[0] > self.num_shared:
            head_weight = head_weight[: self.num_shared]
            head_bias = None if head_bias is None else head_bias[: self.num_shared]
        return Projection(hidden, head_weight, head_bias, self.transform)

    def _at_temperature(self, objective: Objective) -> Objective:
        """Gives the objective its learned temperature, if it has one. For the engine's forward pass, where that is whole."""
        if self.learned is None:
            return objective
        temperature: Tensor = self.learned(self._strength)
        self._temperature = temperature.detach()
        return replace(objective, temperature=temperature)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = self.config.train.max_grad_norm or float("inf")
        self.grad_norm = finite_norm(float(torch.nn.utils.clip_grad_norm_(parameters, limit)))


def finite_norm(grad_norm: float) -> float:
    """The norm itself. Raises NonFiniteLossError, on every rank alike, if it is NaN or infinite."""
    if not math.isfinite(grad_norm):
        raise NonFiniteLossError(
            f"the gradient norm became {grad_norm}, so this step was not taken; lower train.learning_rate, set "
            "train.max_grad_norm, or look for damaged rows in the data"
        )
    return grad_norm


def deepspeed_config(config: DistillConfig) -> dict[str, Any]:
    """The DeepSpeed configuration: what taid-ray owns, merged over what the user passes through."""
    student, passed = config.student, dict(config.student.deepspeed)
    zero = {"stage": student.zero_stage} | passed.pop("zero_optimization", {})
    if student.zero_stage < 2:
        zero["overlap_comm"] = False  # DeepSpeed refuses it below stage 2 when the loop owns the step
    owned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "managed_gradient_accumulation": False,  # backward() accumulates, step() reduces: the loop owns the step
        # DeepSpeed clips at 1.0 unless told otherwise.
        "gradient_clipping": 0.0 if student.zero_stage == 0 else config.train.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the native CPU optimizer would compile at the first start
        "bf16": {"enabled": student.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
    if student.dtype == "bfloat16":
        # Summing micro-batches in bfloat16 would make the trajectory depend on their number.
        owned["data_types"] = {"grad_accum_dtype": "fp32"}
    return passed | owned
