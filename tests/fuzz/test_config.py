"""Whatever the YAML and the overrides hold: a configuration that can be written and read again, or a clear refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from taid_ray.config.schema import DistillConfig, build_config, known_keys, load_config
from taid_ray.config.text import parse_yaml
from taid_ray.errors import ConfigError
from tests.support.feeding import FRAGMENTS, feed, mutated
from tests.support.paths import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
KEYS = sorted(known_keys())
SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS} - {""})
ODD_VALUES = [
    "~", "''", "0", "-1", "1.5", "2.0", "1e400", "-.inf", ".nan", "1e-400", "9" * 400, "9" * 5000, "0x" + "f" * 5000,
    "1_000", "0b12", "0o17", "1:30:00", "-9:" + ":59" * 300, "yes", "off", "true", "2025-02-30", "2025-01-01T00:00:00Z",
    "0001-01-01T00:00:00+23:59", "[]", "{}", "[1, two]", "[0, 4]", "[[0], {a: b}]", "{min: 1, max: 4}", "{min: 5, max: 4}",
    "{a: b}", "{1: 2}", "{~: 2}", "{[a]: b}", "{? {a: b} : c}", "[", "]", "{a", "'", '"', "|", ">-", "%", "@", "`", "#", "- x",
    "? x", "? ", ":", "&x", "*x", "&x [*x]", "&x {k: *x}", "{<<: 3}", "{<<: {steps: 3}}", "{<<: [{a: 1}, {a: 2}]}",
    "[" * 500, "{a: " * 400, "!!python/object/apply:os.abort []", "!!python/name:os.abort", "!x y", "!!str 3", "!!int _",
    "!!int ''", "!!int x", "!!float x", "!!float '1:60e400'", "!!bool maybe", "!!null x", "!!timestamp x", "!!binary '='",
    "!!binary aGVsbG8=", "!!binary /w==", "!!set {a, b}", "!!omap [a: b]", "!!pairs [a: b]", "!!map [a]", "!!seq {a: b}",
    '"\\0"', '"\\ud800"', '"\\ud83d\\ude00"', '"~\\ud83d"',
    '"a\\nb"', '"\\x1b[2J"', "  ", "{{ messages }}", "{% if", "--- x", "...", "%YAML 9.9", "<<", "=",
    "s3://a:b@c/d", "~no-such-user/x", "/", "..", "a/b", "x" * 20000, "all-linear", "auto", "cut", "topk", "local", "float16",
]  # fmt: skip
OWN_FRAGMENTS = [*FRAGMENTS, *(value.encode() for value in ODD_VALUES)]

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from([*KEYS, *SECTIONS]) | st.sampled_from([
    "", ".", "a", "train.", ".train", "train..steps", "student.deepspeed.a", "teacher.quantization.x.y", "teacher.model.x",
    "train.stesp", "schedul.t_start", "student.deepspeed" + ".a" * 3000, "a" + ".b" * 3000, "é.\u2028", "x" * 20000, "a\nb",
])  # fmt: skip
GOOD = [
    "train.steps=7", "schedule.t_start=0.1", "student.workers=4", "loss.name=js", "teacher.replicas={min: 1, max: 3}", "out=~/x",
    "data.prompt_columns=[a, b]", "student.deepspeed={zero_optimization: {a: [1, x, 2.5, null]}}", "teacher.quantization.bits=4",
    "data.chat_template={{ messages }}", "name=a-b", "train.betas=[0.8, 0.9]", "teacher.payload=topk", "data.valid=~",
]  # fmt: skip
odd_overrides = st.builds("{}={}".format, keys, st.sampled_from(ODD_VALUES) | plain_values.map(json.dumps))
overrides = st.lists(st.sampled_from(GOOD) | odd_overrides | st.text(max_size=12), max_size=3)


def check_loaded(path: Path, given: list[str]) -> None:
    """A configuration that RUN/config.yaml keeps, or an error that says in every line which key or file it is about."""
    try:
        config = load_config(path, given)
    except ConfigError as error:
        own = [repr(override.partition("=")[0])[1:-1][:40] for override in given]
        for line in str(error).splitlines():
            assert any(name in line for name in [str(path), "unknown key", *KEYS, *SECTIONS, *own]), line
        assert len(str(error)) < 30_000 + 200 * len(str(error).splitlines())
        assert error.__cause__ is None
        return
    assert isinstance(config, DistillConfig)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    assert build_config(parse_yaml(text)) == config


def test_mutated_files(tmp_path: Path) -> None:
    originals = [path.read_bytes() for path in SHIPPED]
    path = tmp_path / "run.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        check_loaded(path, [])

    feed(mutated(originals, OWN_FRAGMENTS), 2000, check)


def test_mutated_overrides() -> None:
    quickstart = next(path for path in SHIPPED if path.stem == "quickstart")
    feed(overrides, 2000, lambda given: check_loaded(quickstart, given))


def test_trees_of_any_shape() -> None:
    """A whole configuration from scratch, or with whole sections replaced."""

    def check(tree: Any) -> None:
        try:
            build_config(tree)
        except ConfigError as error:
            assert str(error)

    sections = st.sampled_from([*SECTIONS, "name", "out", "x"])
    feed(st.dictionaries(sections, plain_values, max_size=6), 500, check)


def test_an_override_changes_one_place_only(tmp_path: Path) -> None:
    """Also where the file has an alias for two, which PyYAML would make one and the same object."""
    path = tmp_path / "run.yaml"
    text = yaml.safe_dump({"student": {"init": "cut", "layers": [0]}, "data": {"train": "x"}, "train": {"steps": 1}})
    path.write_text(text + "loss: &same {}\nschedule: *same\nteacher: {model: x, quantization: &q {a: 1}}\n")
    assert load_config(path, ["schedule.t_start=0.5"]).schedule.t_start == 0.5


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (".nan", "nan is not a finite number"), ("-.inf", "-inf is not"),
        ("2025-01-01", "read as a date; put it into quotes"), ("'\\0'", None),
        ('"\\0"', "half a character or a NUL"), ('"\\ud800"', "half a character or a NUL"),
        ('"~\\ud83d"', "half a character or a NUL"), ('{"a\\0": 1}', "half a character or a NUL"),
        ("{1: 2}", "the key 1 is not text"), ("{on: 2}", "the key True is not text"),
        ("!!binary aGk=", "could not determine a constructor"), ("9999999999999999999", "more than 64 bits"),
        ("!!bool maybe", "KeyError"), ("!!int ''", "IndexError"), ("!!timestamp x", "AttributeError"),
    ],
)  # fmt: skip
def test_what_run_config_yaml_could_not_hold_is_refused(value: str, said: str | None) -> None:
    overrides = [f"teacher.quantization.key={value}"]
    if said is None:
        assert load_config(SHIPPED[0], overrides).teacher.quantization == {"key": "\\0"}
        return
    with pytest.raises(ConfigError, match=r"teacher\.quantization\.key: the value .* is not valid YAML .*" + said):
        load_config(SHIPPED[0], overrides)


@pytest.mark.parametrize(
    "override", ["data.chat_template={{ '\udce9' }}", "data.chat_template={{\0}}", "teacher.x\udce9=1"]
)
def test_an_override_that_no_text_file_can_hold_is_refused(override: str) -> None:
    """Also where no YAML is read, and for a command line whose bytes are not UTF-8."""
    with pytest.raises(ConfigError, match="half a character or a NUL"):
        load_config(SHIPPED[0], [override])


def test_a_half_character_in_a_file_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('name: a\nteacher: {model: "\\ud83d"}\n')
    with pytest.raises(ConfigError, match=r"run\.yaml: not valid YAML: line 2, column 18: .* half a character"):
        load_config(path)


@pytest.mark.parametrize("text", ["\U0001f600", "\ufeffé", "\U0001f600\U0001f601é"])
def test_the_escapes_of_json_are_whole_characters(text: str) -> None:
    assert parse_yaml(json.dumps({text: [text]})) == {text: [text]}
    override = f"teacher.quantization.key={json.dumps(text)}"
    assert load_config(SHIPPED[0], [override]).teacher.quantization == {"key": text}


@pytest.mark.parametrize("value", ["&x {k: *x}", "[&x [a, *x]]", "[" * 500, "{a: " * 400 + "}" * 400])
def test_what_never_ends_or_is_nested_too_deeply_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"student: {value}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: not valid YAML: .*(nested too deeply|the alias \*x)"):
        load_config(path)
