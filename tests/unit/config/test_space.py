"""Search spaces: what ships is valid, what is drawn is what was asked for, and what is wrong is refused with the key."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid_ray.config.distribution import Distribution
from taid_ray.config.schema import DistillConfig
from taid_ray.config.space import Space, load_space, trial_config
from taid_ray.config.text import read_tree
from taid_ray.errors import ConfigError
from tests.support.paths import ROOT

SHIPPED = sorted((ROOT / "tune_spaces").glob("*.yaml"))
QUICKSTART = ROOT / "taid_ray" / "configs" / "quickstart.yaml"
STEPS = 250


def base(**train: Any) -> dict[str, Any]:
    """The quickstart's configuration, with keys of its section train replaced; None removes one."""
    tree = read_tree(QUICKSTART)
    tree["train"] = {key: value for key, value in (tree["train"] | train).items() if value is not None}
    return tree


def space(keys: dict[str, Any], **others: Any) -> Space:
    return Space.model_validate({"space": keys, **others})


@pytest.fixture
def space_file(tmp_path: Path) -> Path:
    return tmp_path / "space.yaml"


def refusal(path: Path, text: str) -> str:
    """What is said about a space file, at reading or checking it against the quickstart."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_space(path).check(base(), STEPS)
    return str(caught.value)


# What ships


def test_the_spaces_are_shipped() -> None:
    names = {"ctkd", "dkd", "skew", "taid", "taid_paper", "taid_normalised", "schedule_menu", "full"}
    assert {path.stem for path in SHIPPED} == names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spaces_fit_the_quickstart_and_survive_a_round_trip(path: Path) -> None:
    loaded = load_space(path)
    loaded.check(base(eval_every=25), STEPS)
    written = yaml.safe_load(yaml.safe_dump(loaded.model_dump(mode="json")))
    assert Space.model_validate(written) == loaded


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_range_of_a_shipped_space_says_where_it_comes_from_and_why(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").partition("\nspace:\n")[2].splitlines()
    for line in lines:
        if line.strip() and not line.strip().startswith("#"):
            assert any(source in line.partition("#")[2] for source in ("ours", "paper", "reference code")), line
    assert any(line.strip().startswith("# ") for line in lines)


def test_the_shipped_paper_grid_holds_the_published_values() -> None:
    loaded = load_space(ROOT / "tune_spaces" / "taid_paper.yaml")
    params = [
        {
            key: distribution.draw(random.Random(0))
            for key, distribution in loaded.space.items()
            if key != "schedule.mode"
        }
    ]
    assert loaded.num_trials == 4
    assert all(p["schedule.alpha"] == 5e-4 and p["schedule.beta"] == 0.99 for p in params)


# Drawing


@pytest.mark.parametrize(
    ("kind", "arguments", "allowed"),
    [
        ("uniform", [0.2, 0.4], lambda x: 0.2 <= x <= 0.4),
        ("loguniform", [1, 20], lambda x: 1 <= x <= 20),
        ("quniform", [0.2, 0.6, 0.2], lambda x: min(abs(x - y) for y in (0.2, 0.4, 0.6)) < 1e-9),
        ("qloguniform", [2, 8, 2], lambda x: x in (2, 4, 6, 8)),
        ("randint", [1, 4], lambda x: x in (1, 2, 3)),
        ("lograndint", [1, 4], lambda x: x in (1, 2, 3)),
        ("choice", ["a", None, [1, 2]], lambda x: x in ("a", None, [1, 2])),
    ],
)
def test_what_is_drawn_lies_within_the_range_and_fills_it(kind: str, arguments: list[Any], allowed: Any) -> None:
    distribution, numbers = Distribution.model_validate({kind: arguments}), random.Random(0)
    drawn = [distribution.draw(numbers) for _ in range(2000)]
    assert all(allowed(value) for value in drawn)
    if kind == "choice":
        assert all(value in drawn for value in distribution.ends)
    else:
        lower, upper = distribution.ends
        tolerance = 0.0 if "int" in kind or kind.startswith("q") else 0.01 * (upper - lower)
        assert min(drawn) - lower <= tolerance + 1e-9 and upper - max(drawn) <= tolerance + 1e-9


def test_a_logarithmic_range_is_even_in_the_logarithm() -> None:
    distribution, numbers = Distribution.model_validate({"loguniform": [1e-4, 1e-2]}), random.Random(0)
    below = sum(distribution.draw(numbers) < 1e-3 for _ in range(2000))
    assert below / 2000 == pytest.approx(0.5, abs=0.05)


def test_numbers_may_be_written_in_any_way(space_file: Path) -> None:
    """YAML 1.1 reads 1e-4 as text, because the dot is missing."""
    lines = ["train.learning_rate: {loguniform: [1e-4, 2.0e-3]}", "train.batch_size: {randint: [1e1, 40]}"]
    lines += ["schedule.alpha: {choice: [1e-3, .5]}"]
    space_file.write_text("space:\n" + "".join(f"  {line}\n" for line in lines), encoding="utf-8")
    loaded = load_space(space_file)
    loaded.check(base(), STEPS)
    assert [s.arguments for s in loaded.space.values()] == [[1e-4, 2e-3], [10, 40], [1e-3, 0.5]]
    assert all(isinstance(end, int) for end in loaded.space["train.batch_size"].ends)


def test_trials_are_counted() -> None:
    assert space({"schedule.beta": {"uniform": [0, 1]}}).num_trials == 16
    assert space({"schedule.beta": {"uniform": [0, 1]}}, trials=3).num_trials == 3
    grid = {"schedule.beta": {"choice": [0, 1]}, "schedule.t_start": {"choice": [0, 0.1, 0.2]}}
    assert space(grid, search="grid").num_trials == 6


def test_values_beside_the_file_win(space_file: Path) -> None:
    space_file.write_text("trials: 2\nspace: {schedule.beta: {uniform: [0, 1]}}\n", encoding="utf-8")
    assert load_space(space_file, {"trials": 5}).num_trials == 5


# A trial's configuration


def test_a_trial_is_the_base_with_its_params() -> None:
    config = trial_config(base(), {"schedule.t_start": 0.1, "student.lora.rank": 4, "train.betas": [0.8, 0.9]}, None)
    assert isinstance(config, DistillConfig)
    assert config.student.lora and config.student.lora.rank == 4
    assert (config.schedule.t_start, config.train.betas) == (0.1, (0.8, 0.9))
    assert config.schedule.alpha == base()["schedule"]["alpha"]


def test_alpha_steps_is_divided_by_the_trials_own_steps() -> None:
    params = {"schedule.alpha_steps": 5}
    assert trial_config(base(), params, None).schedule.alpha == 5 / 250
    assert trial_config(base(), params | {"train.steps": 100}, STEPS).schedule.alpha == 5 / 100
    epochs = base(steps=None, epochs=2)
    assert trial_config(epochs, params, 80).schedule.alpha == 5 / 80
    with pytest.raises(ConfigError, match=r"schedule\.alpha_steps.*train\.steps"):
        trial_config(epochs, params, None)


def test_a_trial_leaves_the_base_as_it_was() -> None:
    tree = base()
    trial_config(tree, {"schedule.t_start": 0.1, "student.lora.rank": 4}, None)
    assert tree == base()


# Refusing: each message names the key


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ("{unifrm: [0, 1]}", ["'unifrm'", "uniform"]),
        ("{uniform: [0, 1], choice: [1]}", ["one distribution"]),
        ("{}", ["one distribution"]),
        ("0.5", ["one distribution", "0.5"]),
        ("[0, 1]", ["one distribution"]),
        ("{uniform: 0.5}", ["[lower, upper]", "0.5"]),
        ("{uniform: [0.5]}", ["[lower, upper]", "[0.5]"]),
        ("{uniform: [0, 0.5, 0.1]}", ["[lower, upper]"]),
        ("{uniform: [0, yes]}", ["[lower, upper]", "True"]),
        ("{uniform: [0, high]}", ["[lower, upper]", "high"]),
        ("{quniform: [0, 1]}", ["[lower, upper, q]"]),
        ("{uniform: [0.5, 0.5]}", ["empty", "[0.5, 0.5]"]),
        ("{uniform: [0.7, 0.5]}", ["empty", "[0.7, 0.5]"]),
        ("{loguniform: [0, 1]}", ["logarithmic", "above 0"]),
        ("{qloguniform: [-1, 1, 0.5]}", ["logarithmic", "above 0"]),
        ("{quniform: [0, 1, 0]}", ["q must be above 0"]),
        ("{quniform: [0, 1, -1]}", ["q must be above 0"]),
        ("{quniform: [0.1, 1, 0.2]}", ["multiples"]),
        ("{randint: [0, 0.5]}", ["whole numbers"]),
        ("{choice: []}", ["no values"]),
        ("{choice: [0.1, 1e-1]}", ["0.1 twice"]),
        ("{choice: 0.1}", ["list of values"]),
        ("{uniform: [0, 1.1]}", ["less than or equal to 1", "1.1"]),
        ("{uniform: [-0.1, 1]}", ["greater than or equal to 0", "-0.1"]),
        ("{choice: [0.1, 2]}", ["less than or equal to 1", "2"]),
        ("{choice: [0.1, fast]}", ["must be a number", "fast"]),
    ],
)
def test_bad_distributions_are_refused(space_file: Path, distribution: str, expected: list[str]) -> None:
    message = refusal(space_file, f"space:\n  schedule.alpha: {distribution}\n")
    assert all(part in message for part in ["schedule.alpha", *expected]), message


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("schedule.alpa", ["unknown key", "schedule.alpha?"]),
        ("alpha", ["unknown key"]),
        ("schedule", ["whole section", "schedule.mode"]),
        ("student.lora", ["whole section", "student.lora.rank"]),
        ("schedule.alpha.x", ["schedule.alpha", "not a section"]),
        ("name", ["names its trials"]),
        ("out", ["directory of its own"]),
        ("device", ["device"]),
        ("cache.directory", ["share"]),
        ("cache", ["share"]),
        ("teacher", ["whole section", "teacher.model"]),
        ("checkpoint.storage", ["directory of its own"]),
    ],
)
def test_keys_that_cannot_be_searched_are_refused(space_file: Path, key: str, expected: list[str]) -> None:
    message = refusal(space_file, f"space: {{{key}: {{choice: [0.1]}}}}\n")
    assert all(part in message for part in [key, *expected]), message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trails: 3\nspace: {schedule.beta: {choice: [1]}}", ["trails", "unknown key", "trials?"]),
        ("schedule.beta: {choice: [1]}", ["schedule.beta", "space.schedule.beta?"]),
        ("{}", ["space: missing"]),
        ("space: {}", ["space: must not be empty"]),
        ("space: 3", ["space: must be a mapping", "3"]),
        ("[]", ["mapping"]),
        ("space: {schedule.beta: {choice: [1]}, schedule.beta: {choice: [1]}}", ["given twice"]),
        ("search: bayes\nspace: {schedule.beta: {choice: [1]}}", ["search", "'bayes'", "'optuna'"]),
        ("scheduler: pbt\nspace: {schedule.beta: {choice: [1]}}", ["scheduler", "'pbt'"]),
        ("trials: 0\nspace: {schedule.beta: {choice: [1]}}", ["trials", "0"]),
        ("seed: -1\nspace: {schedule.beta: {choice: [1]}}", ["seed", "-1"]),
        ("grace_fraction: 1\nspace: {schedule.beta: {choice: [1]}}", ["grace_fraction", "less than 1"]),
        ("reduction: 1\nspace: {schedule.beta: {choice: [1]}}", ["reduction", "1"]),
        ("search: grid\nspace: {schedule.beta: {uniform: [0, 1]}}", ["space.schedule.beta", "grid", "uniform"]),
        ("search: grid\ntrials: 3\nspace: {schedule.beta: {choice: [0, 1]}}", ["trials = 3", "2 combinations"]),
        (f"search: grid\nspace: {{train.seed: {{choice: {list(range(10_001))}}}}}", ["10,001", "search: random"]),
        ("search: optuna\nspace: {train.batch_size: {qloguniform: [8, 16, 8]}}", ["train.batch_size", "qloguniform"]),
        ("scheduler: asha\nspace: {schedule.beta: {choice: [1]}}", ["train.eval_every: 0", "asha", "to 25"]),
    ],
)
def test_bad_files_are_refused(space_file: Path, text: str, expected: list[str]) -> None:
    message = refusal(space_file, text)
    assert all(part in message for part in expected), message


def test_files_are_named(space_file: Path) -> None:
    assert refusal(space_file, "space: {}").startswith(f"{space_file}: ")
    with pytest.raises(ConfigError, match="absent"):
        load_space(space_file.with_name("absent.yaml"))


def refused(keys: dict[str, Any], tree: dict[str, Any], **others: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        space(keys, **others).check(tree, STEPS)
    return str(caught.value)


def test_alpha_is_searched_in_one_way_only() -> None:
    message = refused({"schedule.alpha": {"choice": [0.1]}, "schedule.alpha_steps": {"choice": [1]}}, base())
    assert "schedule.alpha " in message and "schedule.alpha_steps" in message


@pytest.mark.parametrize("alpha_steps", [{"uniform": [1, 251]}, {"choice": [-1]}, {"choice": ["many"]}])
def test_alpha_steps_outside_of_what_the_steps_allow_is_refused(alpha_steps: dict[str, Any]) -> None:
    message = refused({"schedule.alpha_steps": alpha_steps}, base())
    assert "schedule.alpha_steps" in message and "[0, 250]" in message


def test_what_only_a_combination_does_wrong_is_refused() -> None:
    keys = {"schedule.t_start": {"uniform": [0.0, 0.9]}, "schedule.t_end": {"uniform": [0.8, 1.0]}}
    message = refused(keys, base())
    assert "schedule.t_start = 0.9" in message and "schedule.t_end = 0.8" in message
    # No end of one key goes wrong beside the first end of the other, but the last of both do.
    keys = {"schedule.mode": {"choice": ["normalised", "adaptive"]}, "schedule.gain": {"choice": [10.0, 3.0]}}
    for search in ("grid", "random"):
        message = refused(keys, base(), search=search)
        assert "schedule.gain" in message and "schedule.mode = 'adaptive'" in message


def test_keys_that_need_each_other_are_allowed() -> None:
    """Taken alone beside the base, which is adaptive, this gain would be refused."""
    keys = {"schedule.gain": {"loguniform": [3, 30]}, "schedule.mode": {"choice": ["normalised"]}}
    space(keys).check(base(), STEPS)


def test_a_number_stands_for_a_range() -> None:
    space({"student.workers": {"choice": [1, 2]}, "teacher.replicas": {"randint": [1, 3]}}).check(base(), STEPS)


def test_alpha_steps_beside_a_number_of_steps_that_changes_is_refused() -> None:
    keys = {"schedule.alpha_steps": {"choice": [1]}, "train.batch_size": {"choice": [16, 32]}}
    space(keys).check(base(), STEPS)
    assert "space.train.batch_size" in refused(keys, base(steps=None, epochs=1))


@pytest.mark.parametrize("scheduler", ["asha", "median"])
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train.epochs", [1, 2]),
        ("train.batch_size", [16, 32]),
        ("data.sequence_length", [128, 256]),
        ("data.pack", [True, False]),
        ("teacher.revision", [None, "v2"]),
    ],
)
def test_early_stopping_compares_trials_of_one_length(scheduler: str, key: str, values: list[Any]) -> None:
    """ASHA would stop the longer ones at the base's last step, and say that others are better."""
    keys, tree = {key: {"choice": values}}, base(steps=None, epochs=1, eval_every=10)
    message = refused(keys, tree, scheduler=scheduler)
    assert message.startswith(f"space.{key}: ") and f"scheduler: {scheduler}" in message
    assert "set scheduler: fifo, or leave the key out" in message
    assert ("set train.steps" in message) == (key != "train.epochs")
    for search in ("random", "grid", "optuna"):
        space(keys, search=search).check(tree, STEPS)
    if key != "train.epochs":  # with train.steps they change no length
        space(keys, scheduler=scheduler).check(base(eval_every=10), STEPS)


def test_early_stopping_does_not_go_with_other_numbers_of_steps() -> None:
    keys = {"schedule.beta": {"choice": [0.9]}, "train.steps": {"choice": [250, 500]}}
    assert "space.train.steps: " in refused(keys, base(eval_every=10), scheduler="asha")
    space(keys).check(base(eval_every=10), STEPS)


def test_early_stopping_needs_validations() -> None:
    keys = {"schedule.beta": {"choice": [0.9]}}
    space(keys, scheduler="median").check(base(eval_every=50), STEPS)
    assert "train.eval_every" in refused(keys, base(eval_every=STEPS), scheduler="median")


def test_trials_without_a_teacher_are_compared_by_their_cross_entropy() -> None:
    tree = base() | {"teacher": None, "student": {"model": "small"}, "loss": {"name": "sft"}}
    space = {"space": {"train.learning_rate": {"loguniform": [1e-4, 1e-3]}}}
    with pytest.raises(ConfigError, match=r"metric: kl .* teacher is null; set metric: cross_entropy"):
        Space.model_validate(space).check(tree, 10)
    Space.model_validate(space | {"metric": "cross_entropy"}).check(tree, 10)


def test_a_base_that_is_wrong_itself_is_refused() -> None:
    assert "train.steps" in refused({"schedule.beta": {"choice": [0.9]}}, base(steps=0))


def test_all_distributions_are_ray_tunes() -> None:
    """Their names and arguments are handed on as they are; Ray refuses what we would have let through."""
    tune = pytest.importorskip("ray.tune")
    ranges = {"q": [0.2, 0.6, 0.2], "i": [1, 4]}
    for kind in ("uniform", "loguniform", "quniform", "qloguniform", "randint", "lograndint"):
        distribution = Distribution.model_validate({kind: ranges["q"] if kind[0] == "q" else ranges["i"]})
        lower, upper = distribution.ends
        drawn = [getattr(tune, kind)(*distribution.arguments).sample() for _ in range(200)]
        assert all(lower - 1e-9 <= value <= upper + 1e-9 for value in drawn)
        assert math.isclose(min(drawn), lower) or "int" not in kind


# Variants

TWO = {"slow": {"schedule.mode": "linear", "loss": {"name": "taid"}}, "fast": {"schedule.alpha_steps": 5}}


def test_a_variant_sets_its_values_together_and_counts_as_one_choice() -> None:
    found = space(
        {"variant": {"choice": ["slow", "fast"]}, "train.seed": {"choice": [0, 1]}}, search="grid", variants=TWO
    )
    found.check(base(), STEPS)
    assert found.num_trials == 4 and set(found.keys) == {"train.seed", *TWO["slow"], *TWO["fast"]}
    slow, fast = (
        trial_config(base(), {"variant": name, "train.seed": 7}, STEPS, found.variants) for name in ("slow", "fast")
    )
    assert (slow.schedule.mode, slow.train.seed) == ("linear", 7)
    assert fast.schedule.alpha == 5 / STEPS and fast.schedule.mode == "adaptive"


@pytest.mark.parametrize(
    ("keys", "variants", "said"),
    [
        ({"variant": {"choice": ["slow", "quick"]}}, TWO, "exactly the names there"),
        ({"variant": {"choice": ["slow"]}}, TWO, "exactly the names there"),
        ({"train.seed": {"choice": [1]}}, TWO, "exactly the names there"),
        ({"variant": {"choice": ["slow"]}}, {}, "exactly the names there"),
        ({"variant": {"uniform": [0, 1]}}, {}, "exactly the names there"),
        ({"variant": {"choice": ["a"]}, "train.seed": {"choice": [1]}}, {"a": {"train.seed": 2}}, "also under space"),
        ({"variant": {"choice": ["a"]}}, {"a": {"name": "x"}}, "cannot be searched"),
        ({"variant": {"choice": ["a"]}}, {"a": {"schedule.mod": "linear"}}, "Did you mean schedule.mode"),
    ],
)
def test_variants_that_do_not_fit_are_refused(
    keys: dict[str, Any], variants: dict[str, Any], said: str, space_file: Path
) -> None:
    assert said in refusal(space_file, yaml.safe_dump({"space": keys, "variants": variants}))
