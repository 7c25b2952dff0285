"""The sections `loss` and `schedule`: what the student minimises."""

import math
from typing import Annotated, Literal

from pydantic import model_validator

from taid_ray.config.fields import RESUMABLE, SETS_RATES, BelowOne, NonNegative, Positive, PositiveInt, Section, Unit

LossName = Literal[
    "taid",
    "taid_reverse_kl",
    "forward_kl",
    "reverse_kl",
    "js",
    "tvd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "dkd",
    "ctkd",
    "gkd",
]
"""Losses that compare the student with a teacher."""
SETTINGS: dict[str, tuple[str, ...]] = {
    "weight": ("js", "skew_forward_kl", "skew_reverse_kl"),
    "alpha": ("dkd",),
    "beta": ("gkd", "dkd"),
    "mu": ("adaptive_kl",),
}
"""Keys of the section `loss` that are numbers of some divergences only, and which."""
PUBLISHED = ("adaptive_kl", "ctkd", "dkd")
"""Losses whose code in TAID's repository computes something else (`loss.published`)."""
WITHOUT_TOPK = {
    "adaptive_kl": "its head may reach into the ids that are not sent, and their order is not known",
    "ctkd": "at the high temperatures that it learns, much of the probability is on the ids that are not sent",
}
"""Losses that cannot learn from the likeliest ids alone, and why."""


class LearnedTemperatureConfig(Section):
    """The temperature that `ctkd` learns, T = min + (max - min) * sigmoid(theta), so that it raises the loss."""

    min_temperature: Positive = 1.0
    """Lower bound of the temperature."""
    max_temperature: Positive = 21.0
    """Upper bound of the temperature. A run starts at min + 0.73 * (max - min)."""
    learning_rate: Positive = 1e-2
    """Highest learning rate of theta, which is in the student's optimizer and follows its `lr_schedule`, without weight
    decay. With AdamW that is about how far theta moves in a step."""
    ramp: Unit = 0.1
    """Share of the run in which the reversed gradient rises from nothing to its full size."""

    @model_validator(mode="after")
    def _ordered(self) -> "LearnedTemperatureConfig":
        if self.min_temperature >= self.max_temperature:
            raise ValueError(
                f"loss.ctkd.min_temperature = {self.min_temperature:g} is not below loss.ctkd.max_temperature = "
                f"{self.max_temperature:g}; lower it"
            )
        return self


class LossConfig(Section):
    """The loss that the student minimises."""

    name: Annotated[Literal[LossName, "sft"], SETS_RATES] = "taid"
    """The divergence between teacher and student, per token. `taid` and `taid_reverse_kl` are the only ones that use the section
    `schedule`. `sft` is the cross-entropy on the data's own tokens: it learns from no teacher, and if one is given,
    validations alone ask it."""
    weight: Unit | None = None
    """Mixing weight of `js` (the teacher's share), `skew_forward_kl` and `skew_reverse_kl`. Default: 0.1."""
    alpha: NonNegative | None = None
    """With `dkd`: weight of the term on the label's own probability. Default: 1."""
    beta: NonNegative | None = None
    """With `gkd`: the teacher's share of the mixture, within [0, 1]; 0 is the KL, 1 the reverse KL. Default: 0.5.
    With `dkd`: weight of the term on all other ids. Default: 8."""
    mu: BelowOne | None = None
    """With `adaptive_kl`: the mass of the teacher's likeliest ids that count as head. Default: 0.5."""
    temperature: Positive | None = None
    """Divides the logits of both sides before the divergence is formed; the cross-entropy of `sft_weight` is not changed by it.
    Default: 4 with `dkd`, else 1. With `ctkd` it is learned."""
    temperature_squared: bool | None = None
    """Whether the divergence is multiplied by temperature ** 2, so that gradients keep their size. Default: true with `dkd` and
    `ctkd`, as in their published code, else false."""
    ctkd: LearnedTemperatureConfig | None = None
    """With `ctkd`: how the temperature is learned, with the keys below. Null stands for their defaults."""
    published: Annotated[bool, SETS_RATES] = False
    """With `adaptive_kl`, `ctkd` and `dkd`: compute what TAID's published code does in their place, with its defaults. For
    comparisons with its results only; docs/losses/index.md says what is wrong there."""
    sft_weight: Unit = 0.0
    """Share of plain cross-entropy on the data's own tokens:
    loss = (1 - sft_weight) * divergence + sft_weight * cross-entropy."""
    memory_mib: Annotated[PositiveInt | None, RESUMABLE, SETS_RATES] = None
    """Memory (MiB) for the logits that exist at the same time. It sets how many positions the loss treats at once. Default:
    128 on a CPU, 2048 on a GPU."""

    @model_validator(mode="after")
    def _settings_fit(self) -> "LossConfig":
        for key in SETTINGS:
            if getattr(self, key) is not None and self.name not in SETTINGS[key]:
                raise ValueError(
                    f"loss.{key} only goes with {', '.join(SETTINGS[key])} (found loss.name: {self.name}); remove it"
                )
        if self.name == "ctkd" and self.temperature is not None:
            raise ValueError(
                f"loss.temperature is learned with loss.name: ctkd (found {self.temperature:g}); remove it, and set "
                "loss.ctkd.min_temperature and max_temperature"
            )
        if self.name != "ctkd" and self.ctkd is not None:
            raise ValueError(f"loss.ctkd only goes with loss.name: ctkd (found loss.name: {self.name}); remove it")
        if self.published and self.name not in PUBLISHED:
            raise ValueError(
                f"loss.published only goes with {', '.join(PUBLISHED)} (found loss.name: {self.name}); remove it: what is "
                "published of the others is right"
            )
        for key in ("learning_rate", "ramp") if self.published and self.ctkd else ():
            if getattr(self.ctkd, key) != LearnedTemperatureConfig.model_fields[key].default:
                raise ValueError(
                    f"loss.ctkd.{key} does nothing with loss.published, whose temperature no optimizer moves (found "
                    f"{getattr(self.ctkd, key):g}); remove it"
                )
        if self.name == "gkd" and self.beta is not None and self.beta > 1:
            raise ValueError(f"loss.beta lies within [0, 1] with loss.name: gkd (found {self.beta:g}); lower it")
        changed = [key for key in ("sft_weight", "temperature", "temperature_squared") if getattr(self, key)]
        if self.name == "sft" and changed:
            raise ValueError(
                f"loss.{changed[0]} belongs to a divergence, and loss.name: sft is the cross-entropy alone (found "
                f"{getattr(self, changed[0])}); remove it"
            )
        return self

    @property
    def method(self) -> str:
        """The divergence as the losses' registry knows it."""
        return f"published_{self.name}" if self.published and self.name != "dkd" else self.name

    @property
    def settings(self) -> dict[str, float]:
        """The numbers of the divergence that are given; the others have the loss's defaults."""
        published = {"beta": 0.5} if self.published and self.name == "dkd" else {}
        return published | {key: value for key in SETTINGS if (value := getattr(self, key)) is not None}

    @property
    def fixed_temperature(self) -> float:
        """The temperature of the divergence, if it is not learned."""
        if self.name == "ctkd" and self.published:  # where it begins, and no optimizer moves it
            bounds = self.ctkd or LearnedTemperatureConfig()
            span = bounds.max_temperature - bounds.min_temperature
            return bounds.min_temperature + span / (1 + math.exp(-1))
        return self.temperature or (4.0 if self.name == "dkd" and not self.published else 1.0)

    @property
    def squares_temperature(self) -> bool:
        """True if the divergence is multiplied by the square of the temperature."""
        return self.name in ("dkd", "ctkd") if self.temperature_squared is None else self.temperature_squared

    @property
    def learned_temperature(self) -> LearnedTemperatureConfig | None:
        """Settings of the temperature that is learned; None if none is."""
        return (self.ctkd or LearnedTemperatureConfig()) if self.name == "ctkd" and not self.published else None

    @property
    def shown(self) -> str:
        """Name of the divergence, with the numbers that are given, in words."""
        numbers = [f"{key} {value:g}" for key, value in self.settings.items()]
        if learned := self.learned_temperature:
            numbers.append(f"temperature learned within {learned.min_temperature:g} and {learned.max_temperature:g}")
        if self.fixed_temperature != 1:
            squared = ", times its square" if self.squares_temperature else ""
            numbers.append(f"temperature {self.fixed_temperature:g}{squared}")
        if self.published:
            numbers.append("with the faults of TAID's published code, for comparison only")
        return f"{self.name} ({', '.join(numbers)})" if numbers else self.name

    @property
    def is_taid(self) -> bool:
        """True if the student learns from an intermediate teacher, and t has a course."""
        return self.name in ("taid", "taid_reverse_kl")


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
