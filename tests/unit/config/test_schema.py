"""The configuration: what ships is valid, and what is wrong is refused with the key, the value and the remedy."""

import copy
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid_ray.config.schema import DistillConfig, build_config, known_keys, load_config, stored_config
from taid_ray.config.text import read_tree
from taid_ray.errors import ConfigError
from tests.support.paths import ROOT

SHIPPED = sorted((ROOT / "taid_ray" / "configs").glob("*.yaml"))
PAPER_PAIRS = {
    "tinyswallow": ("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", 0.2),
    "taid_llm_1_5b": ("Qwen/Qwen2-72B-Instruct", "Qwen/Qwen2-1.5B-Instruct", 0.2),
    "phi3_mini_tinyllama": ("microsoft/Phi-3-mini-4k-instruct", "TinyLlama/TinyLlama_v1.1", 0.4),
    "llama2_7b_tinyllama": ("meta-llama/Llama-2-7b-chat-hf", "TinyLlama/TinyLlama_v1.1", 0.2),
    "stablelm_zephyr_pythia": ("stabilityai/stablelm-zephyr-3b", "EleutherAI/pythia-410m", 0.2),
}
MINIMAL: dict[str, Any] = {
    "teacher": {"model": "big"},
    "student": {"model": "small"},
    "data": {"train": "corpus.jsonl"},
    "train": {"steps": 10},
}
SFT: dict[str, Any] = {"teacher": None, "loss__name": "sft"}
CUT: dict[str, Any] = {"init": "cut", "layers": [0]}


def tree_with(**values: Any) -> dict[str, Any]:
    """MINIMAL with some `section__key=value` replaced."""
    tree = copy.deepcopy(MINIMAL)
    for key, value in values.items():
        *sections, last = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    return str(caught.value)


@pytest.fixture
def minimal_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return path


# What ships


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert build_config(config.model_dump()) == config
    assert build_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_each_shipped_config_has_a_name_of_its_own() -> None:
    assert len({load_config(path).name for path in SHIPPED}) == len(SHIPPED)


@pytest.mark.parametrize("name", PAPER_PAIRS)
def test_papers_pairs_are_shipped(name: str) -> None:
    config = load_config(ROOT / "taid_ray" / "configs" / f"{name}.yaml")
    teacher, student, t_start = PAPER_PAIRS[name]
    assert (config.teacher.model, config.student.model) == (teacher, student)
    assert (config.loss.name, config.schedule.mode, config.schedule.t_start) == ("taid", "adaptive", t_start)
    assert (config.schedule.t_end, config.schedule.alpha, config.schedule.beta) == (1.0, 5e-4, 0.99)
    assert (config.train.batch_size, config.train.learning_rate, config.train.warmup_steps) == (64, 1e-4, 0)
    assert (config.student.dtype, config.student.zero_stage, config.data.sequence_length) == ("bfloat16", 2, 2048)


def test_the_papers_vision_language_pair_is_shipped_with_the_models_that_followed() -> None:
    config = load_config(ROOT / "taid_ray" / "configs" / "taid_vlm_2b.yaml")
    assert (config.teacher.model, config.student.model) == tuple(
        f"OpenGVLab/InternVL3-{size}-hf" for size in ("8B", "2B")
    )
    assert config.data.has_images and config.data.image_processor == {"max_patches": 6}
    assert config.student.freeze == ["vision_tower"] and (config.loss.name, config.schedule.mode) == (
        "taid",
        "adaptive",
    )


@pytest.mark.parametrize("name", [*PAPER_PAIRS, "taid_vlm_2b"])
def test_every_value_of_a_papers_pair_says_where_it_comes_from(name: str) -> None:
    sources = ("# paper", "# reference code", "# model card", "# ours")
    for line in (ROOT / "taid_ray" / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("  ") and not line.strip().startswith("#"):
            assert any(source in line for source in sources), line


def test_quickstart_runs_on_files_of_the_package() -> None:
    config = load_config(ROOT / "taid_ray" / "configs" / "quickstart.yaml")
    assert config.data.valid
    for name in (config.teacher.model, config.data.train, config.data.valid):
        assert (ROOT / name).exists(), name
    assert (config.student.init, config.student.layers) == ("cut", [0, 4])


def test_bundled_files_are_small_and_licensed() -> None:
    bundle = Path(str(resources.files("taid_ray"))) / "quickstart"
    assert sum(path.stat().st_size for path in bundle.glob("*.jsonl")) <= 1_500_000
    assert "CDLA-Sharing-1.0" in (bundle / "DATA_LICENSE.md").read_text(encoding="utf-8")
    assert "MIT License" in (bundle / "stories260k" / "LICENSE").read_text(encoding="utf-8")
    train, valid = ({*path.read_text(encoding="utf-8").splitlines()} for path in sorted(bundle.glob("*.jsonl")))
    assert train
    assert valid
    assert not train & valid


def test_constraints_lie_within_the_declared_dependencies() -> None:
    """Every direct dependency is pinned to what is tested, so that two installations are the same."""
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    for requirement in map(packaging.Requirement, declared):
        if requirement.name != project["name"]:
            pin = pins.get(requirement.name.lower().replace("_", "-"))
            assert pin, f"{requirement.name} is missing in constraints.txt"
            assert requirement.specifier.contains(pin), f"{requirement} does not allow the tested {pin}"


# Help


def test_every_key_has_help() -> None:
    keys = known_keys()
    assert "schedule.t_start" in keys
    assert "student.lora.rank" in keys
    assert [key for key, text in keys.items() if not text.strip()] == []


# Reading


def test_defaults_are_those_of_the_reference() -> None:
    config = build_config(MINIMAL)
    assert config.schedule.model_dump() == {
        "mode": "adaptive", "t_start": 0.4, "t_end": 1.0, "alpha": 5e-4, "beta": 0.99, "gain": 10.0,
        "signal": "cross_entropy",
    }  # fmt: skip
    assert config.run_dir == Path("runs/distill").absolute()


def test_other_losses_run_at_t_1_whatever_the_schedule_says() -> None:
    config = build_config(tree_with(schedule__t_start=0.2))
    assert config.effective_schedule == config.schedule
    other = build_config(tree_with(schedule__t_start=0.2, loss__name="forward_kl")).effective_schedule
    assert (other.mode, other.t_start, other.t_end) == ("constant", 1.0, 1.0)


def test_taid_reverse_kl_follows_the_schedule() -> None:
    config = build_config(tree_with(schedule__t_start=0.2, loss__name="taid_reverse_kl"))
    assert config.effective_schedule == config.schedule


def test_a_loss_has_what_is_given_and_its_own_temperature() -> None:
    loss = build_config(tree_with(loss={"name": "dkd", "beta": 2.0})).loss
    assert (loss.settings, loss.fixed_temperature, loss.squares_temperature) == ({"beta": 2.0}, 4.0, True)
    assert loss.shown == "dkd (beta 2, temperature 4, times its square)"
    loss = build_config(tree_with(loss={"name": "dkd", "temperature": 2, "temperature_squared": False})).loss
    assert (loss.fixed_temperature, loss.squares_temperature) == (2.0, False)
    loss = build_config(tree_with(loss__name="ctkd")).loss
    assert loss.learned_temperature is not None and loss.squares_temperature
    assert loss.shown == "ctkd (temperature learned within 1 and 21)"
    loss = build_config(tree_with()).loss
    assert (loss.learned_temperature, loss.settings, loss.fixed_temperature, loss.squares_temperature, loss.shown) == (
        None,
        {},
        1.0,
        False,
        "taid",
    )


def test_published_losses_have_the_published_defaults() -> None:
    loss = build_config(tree_with(loss={"name": "dkd", "published": True})).loss
    assert (loss.method, loss.settings, loss.fixed_temperature) == ("dkd", {"beta": 0.5}, 1.0)
    loss = build_config(tree_with(loss={"name": "ctkd", "published": True})).loss
    assert (loss.method, loss.learned_temperature, loss.squares_temperature) == ("published_ctkd", None, True)
    assert loss.fixed_temperature == pytest.approx(15.621172, rel=1e-6)
    loss = build_config(tree_with(loss={"name": "adaptive_kl", "published": True})).loss
    assert loss.method == "published_adaptive_kl" and "for comparison only" in loss.shown


def test_a_run_without_a_teacher(minimal_file: Path) -> None:
    config = load_config(minimal_file, ["teacher=null", "loss.name=sft"])
    assert config.teacher is None and not config.has_pool and not config.learns_from_teacher
    assert config.effective_schedule.mode == "constant" and config.peer_timeout_s == config.student.timeout_s
    assert build_config(config.model_dump(mode="json")) == config
    again = build_config(config.model_dump(mode="json"), ["teacher.model=big", "loss.name=taid"])
    assert again.given_teacher.model == "big" and again.has_pool and again.learns_from_teacher
    evaluated = build_config(tree_with(loss__name="sft"))
    assert evaluated.has_pool and not evaluated.learns_from_teacher


def test_overrides_are_typed_and_nested(minimal_file: Path) -> None:
    overrides = ["schedule.t_start=0.3", "train.learning_rate=2e-3", "student.lora.rank=4", "train.steps=7"]
    config = load_config(minimal_file, [*overrides, "data.prompt_columns=[a, b]", "teacher.revision=null"])
    assert (config.schedule.t_start, config.train.learning_rate, config.train.steps) == (0.3, 2e-3, 7)
    assert config.student.lora
    assert config.student.lora.rank == 4
    assert config.data.prompt_columns == ["a", "b"]
    assert config.teacher.revision is None


def test_the_last_override_wins_and_a_value_may_hold_equals_signs(minimal_file: Path) -> None:
    config = load_config(minimal_file, ["train.steps=5", "train.steps=6", "data.text_column=a=b"])
    assert (config.train.steps, config.data.text_column) == (6, "a=b")


def test_values_are_taken_literally_and_win(minimal_file: Path) -> None:
    config = load_config(minimal_file, ["out=other", "train.steps=7"], {"out": "run #1: [a", "data.train": "a: b"})
    assert (config.run_dir, config.data.train) == (Path("run #1: [a").absolute(), "a: b")
    assert (config.train.steps, config.teacher.model) == (7, "big")


def test_the_run_directory_may_lie_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_config(tree_with(out="~/runs/a")).run_dir == tmp_path / "runs" / "a"


@pytest.mark.parametrize(
    ("values", "on"),
    [({}, False), ({"disk_gib": 9}, False), ({"directory": "c"}, True)],
)
def test_the_cache_is_on_where_it_has_a_place(values: dict[str, Any], on: bool) -> None:
    assert build_config(tree_with(cache=values)).cache.on == on


def test_the_removed_key_of_the_cache_is_refused_with_what_to_set_instead() -> None:
    message = refusal(tree_with(cache__memory_gib=8))
    assert message.startswith("cache.memory_gib is no key any more; ") and "cache.directory: /dev/shm/" in message
    assert build_config(tree_with(cache__memory_gib=0.0)) == build_config(tree_with())  # as older runs wrote it


@pytest.mark.parametrize("memory_gib", [0.0, 8.0])
def test_a_stored_configuration_of_an_older_version_is_read(memory_gib: float) -> None:
    tree = tree_with(cache__memory_gib=memory_gib, cache__disk_gib=9)
    assert stored_config(tree) == build_config(tree_with(cache__disk_gib=9, data__order="blocks"))
    assert tree["cache"] == {"memory_gib": memory_gib, "disk_gib": 9}
    with pytest.raises(ConfigError, match=r"^cache\.memory: unknown key"):
        stored_config(tree_with(cache__memory=1))


def test_a_stream_is_shuffled_in_blocks() -> None:
    streamed = tree_with(data__streaming=True, train__steps=10)
    assert build_config(tree_with()).data.order == "global"
    assert build_config(streamed).data.order == "blocks"
    with pytest.raises(ConfigError, match=r"data\.order: global needs data with an end"):
        build_config(tree_with(data__streaming=True, train__steps=10, data__order="global"))


def test_the_store_of_encoded_data_is_beside_the_run() -> None:
    assert build_config(tree_with(out="/somewhere/run")).data_store == "/somewhere/encoded-data"
    assert build_config(tree_with(data__store="s3://bucket/data")).data_store == "s3://bucket/data"


@pytest.mark.parametrize("tree", [None, 3, "text", ["a"]])
def test_a_configuration_that_is_no_mapping_is_refused(tree: Any) -> None:
    for build in (stored_config, build_config):
        with pytest.raises(ConfigError, match="expected a mapping of sections"):
            build(tree)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "train:\n  steps: 3\n  epochs: 1\n  steps: 4\n",
            "line 4, column 3: the key 'steps' is given twice",
        ),
        ("name: a\ntrain: {steps: 1}\nname: b\n", "line 3, column 1: the key 'name'"),
        ("train: {steps: 1, steps: 2}\n", "line 1, column 19: the key 'steps'"),
        ("name: 2025-02-30\n", "day"),  # YAML takes it for a date
    ],
)
def test_what_yaml_would_take_silently_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: not valid YAML: ") as caught:
        load_config(path)
    assert expected in str(caught.value)


def test_merged_mappings_may_repeat_a_key(tmp_path: Path) -> None:
    """`<<` is there to be overwritten, also twice over."""
    path = tmp_path / "run.yaml"
    base = "a: &a {steps: 1, batch_size: 2}\nb: &b\n  <<: *a\n  steps: 3\ntrain:\n  <<: *b\n  batch_size: 4\n"
    path.write_text(base, encoding="utf-8")
    assert read_tree(path)["train"] == {"steps": 3, "batch_size": 4}


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        build_config(MINIMAL).train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", ["mapping", "['a', 'b']"]),
        ("", ["mapping", "None"]),
        ("a: [1,\n", ["not valid YAML"]),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(part in str(caught.value) for part in [str(path), *expected])


def test_missing_directory_and_binary_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            load_config(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", ["'train.steps'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("train.steps=[1", ["train.steps", "'[1'"]),
        ("train.steps.more=1", ["train.steps.more", "10", "not a section"]),
        ("train={steps: 1, steps: 2}", ["train: ", "'steps' is given twice"]),
        ("name=2025-02-30", ["name: ", "'2025-02-30'", "double quotes"]),
        ("train.stepps=1", ["train.stepps", "found 1", "train.steps"]),
    ],
)
def test_bad_overrides_are_named(minimal_file: Path, override: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal_file, [override])
    assert all(part in str(caught.value) for part in expected)


# Refusing: each message names the dotted key and the value found


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"schedule__t_strat": 0.3}, ["schedule.t_strat", "0.3", "schedule.t_start?"]),
        ({"train__learning_rat": 0.1}, ["train.learning_rat", "0.1", "train.learning_rate?"]),
        ({"student__lora": {"rnak": 3}}, ["student.lora.rnak", "3", "student.lora.rank?"]),
        ({"loss__qqqqqq": 1}, ["loss.qqqqqq", "1", "name", "sft_weight"]),
    ],
)
def test_unknown_keys_get_the_nearest_known_one(values: dict[str, Any], expected: list[str]) -> None:
    message = refusal(tree_with(**values))
    assert all(part in message for part in ["unknown key", *expected]), message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # wrong type
        ("train.steps", "many"),
        ("train.steps", 1.5),
        ("train.learning_rate", [1]),
        ("teacher.model", 7),
        ("data.pack", "perhaps"),
        ("data.prompt_columns", "prompt"),
        ("student.deepspeed", "offload"),
        ("teacher", "big"),
        # not one of the choices
        ("loss.name", "kl"),
        ("student.zero_stage", 4),
        ("student.dtype", "float16"),
        ("schedule.mode", "cosine"),
        ("schedule.signal", "ce"),
        ("teacher.payload", "top-5"),
        # out of range
        ("schedule.t_start", -0.1),
        ("schedule.t_end", 1.5),
        ("schedule.alpha", 2.0),
        ("schedule.beta", -1.0),
        ("schedule.alpha", float("nan")),
        ("train.learning_rate", float("inf")),
        ("train.learning_rate", 0.0),
        ("train.weight_decay", -0.5),
        ("train.warmup_steps", -3),
        ("train.batch_size", 0),
        ("train.micro_batch_size", 0),
        ("student.workers", 0),
        ("teacher.shards", 0),
        ("teacher.timeout_s", 0.0),
        ("data.sequence_length", 1),
        ("loss.weight", 1.5),
        ("loss.temperature", 0),
        ("loss.mu", 1.0),
        ("loss.beta", -0.1),
        ("name", "a name/with slash"),
        ("name", ""),
        ("name", ".."),
        # nothing where something is needed
        ("teacher.model", ""),
        ("student.model", " "),
        ("data.train", ""),
        ("data.valid", ""),
        ("data.prompt_columns", []),
        ("student.lora.target_modules", []),
        ("out", ""),
        # not a directory here
        ("out", "s3://bucket/run"),
        ("out", "~nobody-of-this-name/run"),
        ("cache.directory", ""),
        ("cache.directory", "s3://bucket/cache"),
        ("cache.directory", "~nobody-of-this-name/cache"),
        ("cache.disk_gib", 0.0),
    ],
)
def test_wrong_values_are_refused_with_key_and_value(key: str, value: Any) -> None:
    message = refusal(tree_with(**{key.replace(".", "__"): value}))
    assert message.startswith(f"{key}: "), message
    assert repr(value) in message


@pytest.mark.parametrize("section", ["teacher", "student", "data", "train"])
def test_missing_sections_are_named(section: str) -> None:
    tree = tree_with()
    del tree[section]
    assert refusal(tree).startswith(f"{section}: missing")


def test_every_problem_is_reported_at_once() -> None:
    message = refusal(tree_with(train__batch_size=0, schedule__beta=3, data__tran="x"))
    assert all(key in message for key in ("train.batch_size", "schedule.beta", "data.tran"))
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"schedule__t_start": 0.9, "schedule__t_end": 0.5}, ["schedule.t_start", "0.9", "schedule.t_end", "0.5"]),
        ({"schedule__t_start": 0, "schedule__signal": "kl"}, ["schedule.signal", "kl", "schedule.t_start"]),
        ({"schedule": {"mode": "normalised", "t_start": 0, "signal": "kl"}}, ["schedule.signal", "schedule.t_start"]),
        ({"schedule__gain": 3}, ["schedule.gain", "3", "adaptive", "normalised"]),
        ({"schedule": {"mode": "normalised", "gain": 0}}, ["schedule.gain", "greater than 0", "0"]),
        ({"train__epochs": 2}, ["train.steps", "train.epochs", "both"]),
        ({"train__steps": None}, ["train.steps", "train.epochs", "neither"]),
        ({"train__warmup_steps": 11}, ["train.warmup_steps", "11", "train.steps", "10"]),
        ({"train__steps": None, "train__epochs": 1, "data__streaming": True}, ["train.epochs", "train.steps"]),
        ({"loss__weight": 0.5}, ["loss.weight", "js", "taid"]),
        ({"loss": {"name": "gkd", "mu": 0.5}}, ["loss.mu", "adaptive_kl", "gkd"]),
        ({"loss": {"name": "adaptive_kl", "beta": 0.5}}, ["loss.beta", "gkd", "dkd", "adaptive_kl"]),
        ({"loss": {"name": "gkd", "alpha": 0.5}}, ["loss.alpha", "dkd", "gkd"]),
        ({"loss": {"name": "gkd", "beta": 1.5}}, ["loss.beta", "[0, 1]", "gkd", "1.5"]),
        ({"loss": {"name": "ctkd", "temperature": 2}}, ["loss.temperature", "ctkd", "2", "max_temperature"]),
        ({"loss": {"name": "dkd", "ctkd": {"ramp": 0.5}}}, ["loss.ctkd", "dkd"]),
        (
            {"loss": {"name": "ctkd", "ctkd": {"min_temperature": 9, "max_temperature": 2}}},
            ["loss.ctkd.min_temperature", "9", "loss.ctkd.max_temperature", "2"],
        ),
        (
            {"loss": {"name": "ctkd", "published": True, "ctkd": {"ramp": 0.5}}},
            ["loss.ctkd.ramp", "loss.published", "0.5", "remove"],
        ),
        ({"loss": {"name": "gkd", "published": True}}, ["loss.published", "adaptive_kl, ctkd, dkd", "gkd"]),
        ({"loss": {"name": "adaptive-kl"}}, ["loss.name", "'adaptive-kl'", "Did you mean adaptive_kl?"]),
        (
            {"loss__name": "adaptive_kl", "teacher__payload": "topk"},
            ["loss.name", "adaptive_kl", "teacher.payload: topk", "head", "hidden"],
        ),
        (
            {"loss__name": "ctkd", "teacher__payload": "topk"},
            ["loss.name", "ctkd", "teacher.payload: topk", "high temperatures", "hidden"],
        ),
        (
            {"loss__name": "taid_reverse_kl", "schedule__t_start": 0},
            ["taid_reverse_kl", "schedule.t_start", "adaptive", "found schedule.t_start: 0"],
        ),
        ({"student__model": None}, ["student.model", "missing", "student.init"]),
        ({"student__init": "cut", "student__model": None}, ["student.layers", "cut"]),
        ({"student__init": "cut", "student__layers": [0]}, ["student.model", "'small'", "cut"]),
        ({"student__layers": [0]}, ["student.layers", "cut", "pretrained"]),
        ({"student": CUT | {"revision": "v2"}}, ["student.revision", "'v2'", "teacher.revision"]),
        ({"student": {"init": "scratch", "revision": "v2"}}, ["student.revision", "'v2'", "teacher.revision"]),
        ({"student": {"init": "scratch", "trust_remote_code": True}}, ["student.trust_remote_code", "scratch"]),
        (
            {"student": CUT | {"trust_remote_code": True}},
            ["student.trust_remote_code", "cut", "teacher.trust_remote_code"],
        ),
        (
            {"student__zero_stage": 1, "student__deepspeed": {"zero_optimization": {"overlap_comm": True}}},
            ["student.deepspeed", "overlap_comm", "student.zero_stage: 2", "found 1"],
        ),
        ({"student__architecture": {"num_hidden_layers": 2}}, ["student.architecture", "scratch", "pretrained"]),
        (
            {"student__dtype": "float32", "student__attention": "flash_attention_2"},
            ["student.attention", "flash_attention_2", "student.dtype: float32", "sdpa"],
        ),
        ({"teacher__mode": "local", "teacher__replicas": 2}, ["teacher.mode", "local", "replicas: 2", "pool"]),
        (
            {"teacher__mode": "cache"},
            ["teacher.mode: cache", "taid-ray cache warm", "cache.directory", "teacher.mode: pool"],
        ),
        ({"teacher": None}, ["teacher: null", "loss.name: taid", "set loss.name: sft", "give teacher.model"]),
        (SFT | {"student": CUT}, ["teacher: null", "student.init: cut", "student.model"]),
        (SFT | {"student": {"init": "scratch"}}, ["teacher: null", "student.init: scratch", "set student.model"]),
        (SFT | {"student__resize_to_teacher": True}, ["teacher: null", "student.resize_to_teacher", "remove it"]),
        (SFT | {"cache__directory": "c"}, ["teacher: null", "cache.directory", "remove it"]),
        (
            SFT | {"checkpoint__best": "kl", "train__eval_every": 5},
            ["teacher: null", "checkpoint.best: kl", "cross_entropy"],
        ),
        ({"loss": {"name": "sft", "sft_weight": 0.5}}, ["loss.sft_weight", "loss.name: sft", "0.5"]),
        ({"loss": {"name": "sft", "weight": 0.5}}, ["loss.weight", "found loss.name: sft"]),
        ({"teacher__mode": "local", "teacher__shards": 3}, ["teacher.mode", "local", "shards: 3", "pool"]),
        ({"teacher__outputs": "o.parquet"}, ["teacher.outputs", "teacher.mode: file", "found teacher.mode: pool"]),
        ({"teacher__mode": "file"}, ["teacher.mode: file", "teacher.outputs", "not set"]),
        (
            {"teacher__mode": "file", "teacher__outputs": "o.parquet"},
            ["teacher.mode: file", "found teacher.payload: hidden", "teacher.payload: topk", "teacher.topk"],
        ),
        (
            {"teacher__mode": "file", "teacher__outputs": "o.parquet", "teacher__payload": "topk"},
            ["teacher.mode: file", "cache.directory", "not set"],
        ),
        (
            {
                "teacher__mode": "file",
                "teacher__outputs": "o.parquet",
                "teacher__payload": "topk",
                "cache__directory": "c",
            }
            | {"data__format": "chat", "data__images_column": "images"},
            ["teacher.mode: file", "data.images_column", "pool, local or cache"],
        ),
    ],
)
def test_contradictions_name_both_sides(values: dict[str, Any], expected: list[str]) -> None:
    message = refusal(tree_with(**values))
    assert len(message.splitlines()) == 1
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("raw", "instead"),
    [
        ({"optimizer": {"type": "Lion"}}, "train.learning_rate"),
        ({"gradient_clipping": 0.5}, "train.max_grad_norm"),
        ({"fp16": {"enabled": True}}, "student.dtype"),
        ({"gradient_accumulation_steps": 2}, "train.micro_batch_size"),
        ({"zero_optimization": {"stage": 3}}, "student.zero_stage"),
        ({"amp": {"enabled": True}}, "student.dtype"),
        ({"bfloat16": {"enabled": True}}, "student.dtype"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "nothing: "),
        ({"zero_force_ds_cpu_optimizer": True}, "nothing: "),
        ({"zero_allow_untested_optimizer": False}, "nothing: "),
        ({"steps_per_print": 1}, "nothing: "),
        ({"train_micro_batch_size_per_gpu": 1}, "train.micro_batch_size"),
        ({"train_steps": 1}, "train.batch_size"),
    ],
)
def test_deepspeed_keys_that_taid_ray_owns_are_refused(raw: dict[str, Any], instead: str) -> None:
    message = refusal(tree_with(student__deepspeed=raw))
    assert all(part in message for part in ("student.deepspeed", next(iter(raw)), instead)), message


@pytest.mark.parametrize("value", [3, None, [1]])
def test_deepspeeds_own_section_must_be_a_mapping(value: Any) -> None:
    message = refusal(tree_with(student__deepspeed={"zero_optimization": value}))
    assert all(
        part in message for part in ("student.deepspeed: ", "'zero_optimization' must be a mapping", repr(value))
    )
    assert refusal(tree_with(student__deepspeed=None)).startswith("student.deepspeed: must be a mapping (found None)")


def test_other_deepspeed_keys_pass_through() -> None:
    raw = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    assert build_config(tree_with(student__deepspeed=raw)).student.deepspeed == raw


def test_long_values_are_shortened_in_messages() -> None:
    assert len(refusal(tree_with(train__steps=["x"] * 1000))) < 300


def test_schema_rejects_the_same_things_when_built_directly() -> None:
    with pytest.raises(ValueError, match="t_start"):
        DistillConfig.model_validate(tree_with(schedule__t_start=2))


@pytest.mark.parametrize(
    ("given", "low", "high", "shown"),
    [(3, 3, 3, 3), ({"min": 1, "max": 4}, 1, 4, {"min": 1, "max": 4}), ({"min": 2, "max": 2}, 2, 2, 2)],
)
def test_replicas_are_a_number_or_a_range(given: Any, low: int, high: int, shown: Any) -> None:
    config = build_config(tree_with(teacher__replicas=given))
    assert (config.teacher.replicas.min, config.teacher.replicas.max) == (low, high)
    assert config.teacher.replicas.fixed == (low == high)
    assert config.model_dump()["teacher"]["replicas"] == shown
    assert build_config(config.model_dump()) == config  # what RUN/config.yaml holds can be read again


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, ["teacher.replicas", "at least 1", "found 0"]),
        (True, ["teacher.replicas", "whole number", "True"]),
        ("two", ["teacher.replicas", "{min: A, max: B}", "'two'"]),
        (1.5, ["teacher.replicas", "whole number", "1.5"]),
        ({"min": 3, "max": 1}, ["teacher.replicas: min = 3", "max = 1", "lower min"]),
        ({"min": 1}, ["teacher.replicas.max", "missing"]),
        ({"min": 0, "max": 1}, ["teacher.replicas.min", "found 0"]),
        ({"min": 1, "max": 2, "mean": 1}, ["teacher.replicas.mean", "unknown key"]),
    ],
)
def test_bad_replicas_are_refused(given: Any, expected: list[str]) -> None:
    message = refusal(tree_with(teacher__replicas=given))
    assert len(message.splitlines()) == 1
    assert all(part in message for part in expected), message
