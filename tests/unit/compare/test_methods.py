"""Methods of a comparison: each differs from the others in its loss only, and what does not fit is refused."""

from typing import Any

import pytest

from taid_ray.compare.methods import METHODS, check_comparable, comparison_space
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.config.space import trial_config
from taid_ray.errors import ConfigError
from tests.support.harness import small_config


def config_of(**sections: Any) -> DistillConfig:
    return build_config(small_config("compared", **sections))


def configs(config: DistillConfig, methods: list[str], seeds: int = 2) -> dict[tuple[str, int], DistillConfig]:
    """Configuration of every trial, by method and seed."""
    space, tree = comparison_space(config, methods, seeds), config.model_dump(mode="json")
    space.check(tree, 10)
    return {
        (method, seed): trial_config(tree, {"variant": method, "train.seed": seed}, 10, space.variants)
        for method in methods
        for seed in space.space["train.seed"].arguments
    }


@pytest.mark.parametrize("own", ["taid", "js", "forward_kl"])
def test_methods_of_a_seed_differ_in_loss_and_schedule_only(own: str) -> None:
    loss = {"name": own, "sft_weight": 0.25} | ({"weight": 0.5} if own == "js" else {})
    found = configs(config_of(loss=loss, train={"seed": 5}), [*METHODS])
    assert {seed for _, seed in found} == {5, 6}
    for (method, seed), config in found.items():
        assert config.loss.name == METHODS[method] and config.train.seed == seed
        assert config.loss.sft_weight == (0 if method == "sft" else 0.25)
        assert config.loss.weight == (0.5 if method == own == "js" else None)
        same = {"loss", "schedule"}
        assert config.model_dump(exclude=same) == found["forward_kl", seed].model_dump(exclude=same)


def test_the_schedule_of_taid_is_linear_or_adaptive_whatever_the_configuration_has() -> None:
    for own, adaptive in (("linear", "adaptive"), ("constant", "adaptive"), ("normalised", "normalised")):
        schedule = {"mode": own, "t_start": 0.3} | ({"gain": 3.0} if own == "normalised" else {})
        found = configs(config_of(schedule=schedule), ["taid", "taid_linear"], 1)
        modes = {method: (config.schedule.mode, config.schedule.t_start) for (method, _), config in found.items()}
        assert modes == {"taid": (adaptive, 0.3), "taid_linear": ("linear", 0.3)}


@pytest.mark.parametrize(
    ("methods", "seeds", "said"),
    [
        (["taid", "foward_kl"], 3, "'foward_kl'. Did you mean forward_kl?"),
        (["gkd"], 3, "Did you mean gkd_offline"),
        (["zzz"], 3, "Methods: sft, "),
        (["taid", "taid"], 3, "twice"),
        (["taid"], 0, "at least 1"),
        (["taid"], 501, "more than 500 runs"),
    ],
)
def test_methods_that_there_are_not_are_refused(methods: list[str], seeds: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        comparison_space(config_of(), methods, seeds)


def test_a_teacher_that_is_not_there_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.mode: cache has stored outputs only"):
        check_comparable(config_of(teacher={"mode": "cache", "replicas": 1}, cache={"directory": str(tmp_path)}))
    with pytest.raises(ConfigError, match="teacher is null"):
        check_comparable(
            config_of(
                teacher=None, student={"init": "pretrained", "layers": None, "model": "org/x"}, loss={"name": "sft"}
            )
        )
    check_comparable(config_of())


def test_images_are_not_compared() -> None:
    with pytest.raises(ConfigError, match=r"data\.images_column: a comparison evaluates its students on text only"):
        check_comparable(config_of(data={"train": "d", "format": "chat", "images_column": "images"}))


def test_methods_that_do_not_fit_the_payload_are_refused_before_anything_starts() -> None:
    config = config_of(teacher={"payload": "topk", "topk": 8})
    comparison_space(config, ["taid"], 1).check(config.model_dump(mode="json"), 10)
    with pytest.raises(ConfigError, match=r"topk(.|\n)*which allows variant = 'adaptive_kl'"):
        comparison_space(config, ["taid", "adaptive_kl"], 1).check(config.model_dump(mode="json"), 10)
