"""The sections `loss` and `schedule`: what the student minimises."""

from typing import Annotated, Literal

from pydantic import model_validator

from taid_ray.config.fields import RESUMABLE, SETS_RATES, Positive, PositiveInt, Section, Unit

LossName = Literal["taid", "forward_kl", "reverse_kl", "js", "tvd", "skew_forward_kl", "skew_reverse_kl"]
WEIGHTED_LOSSES = ("js", "skew_forward_kl", "skew_reverse_kl")


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

    mode: Literal["adaptive", "normalised", "exponential", "linear", "constant"] = "adaptive"
    """`adaptive`: the paper's rule, which moves t faster while the loss falls. `normalised`: the same rule with the fall of the
    loss divided by its usual size, so that fast and slow learning really differ. `exponential`: the curve that the paper's
    rule takes while the loss stands still, whatever the loss does. `linear`: from t_start towards t_end. `constant`: t stays at
    t_start."""
    t_start: Unit = 0.4
    """Value of t at the first step. The paper uses 0.4 for Phi-3, and 0.2 for its other pairs."""
    t_end: Unit = 1.0
    """Value that t moves to; 1 is the teacher itself. As in the published code the last step uses the value of two steps
    before, so that a linear schedule ends just below it."""
    alpha: Unit = 5e-4
    """Step size of the adaptive rule and of `exponential`. What matters is alpha times the number of steps, so
    a short run needs a larger one."""
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
