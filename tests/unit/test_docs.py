"""What the documents point to is there: files, modules, tests and targets of make. The reference has every key."""

import importlib.util
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command

from taid_ray.cli.app import app
from taid_ray.config.data import DataConfig
from taid_ray.config.objective import LossName
from taid_ray.config.schema import DistillConfig, known_keys
from taid_ray.config.space import ALPHA_STEPS
from taid_ray.media.families import FAMILIES
from tests.support.paths import ROOT

DOCUMENTS = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING"))]
OTHERS_OPTIONS = {"--account", "--dependency", "--exclusive", "--requeue", "--set", "--temp-dir"}
"""Of Slurm, helm and Ray."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_everything_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    paths = re.findall(r"`((?:taid_ray|tests|cluster|tune_spaces|benchmarks|docs)/[\w./-]+)`", text)
    missing += [path for path in paths if not re.search(r"[A-Z]{4}|\.\.\.", path) and not (ROOT / path).exists()]
    tests = {
        path.relative_to(ROOT / "tests").with_suffix("").as_posix() for path in (ROOT / "tests").rglob("test_*.py")
    }
    named = re.findall(r"`((?:[\w/]+/)?test_\w+)`", text)
    missing += [name for name in named if not any(f"/{test}".endswith(f"/{name}") for test in tests)]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    missing += [target for target in re.findall(r"(?:`| {4})make ([a-z][\w-]+)", text) if target not in targets]
    assert not missing


def test_the_table_of_vision_families_is_that_of_the_code() -> None:
    """Types, modules to freeze, and whether documents pack."""
    part = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8").partition("## Families\n")[2].partition("\n## ")[0]
    found = {}
    for line in part.splitlines():
        if line.startswith("| `") and "model_type" not in line:
            types, _, modules, packs = line.strip("|").split("|")
            row = (tuple(re.findall(r"`(\w+)`", modules)), packs.strip() == "yes")
            found |= dict.fromkeys(re.findall(r"`(\w+)`", types), row)
    assert found == {name: (family.vision, family.packs) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_and_every_key_that_is_named_exists(document: Path) -> None:
    text = re.sub(r"\\\n\s*", "", document.read_text(encoding="utf-8"))
    commands = {name: options_of(command) for name, command in get_command(app).commands.items()}
    for group in ("cache", "data", "demo"):
        commands[group] |= {
            o for command in get_command(app).commands[group].commands.values() for o in options_of(command)
        }
    missing = [
        f"{command} {option}"
        for command, rest in re.findall(r"taid-ray ([a-z]+)\b([^`\n#]*)", text)
        for option in re.findall(r"(?<!\S)\[?(--[\w-]+)", rest)
        if option not in commands.get(command, ())
    ]
    known_options = set().union(*commands.values()) | OTHERS_OPTIONS
    missing += [option for option in re.findall(r"`(--[\w-]+)", text) if option not in known_options]
    keys = {part for key in (*known_keys(), ALPHA_STEPS) for part in (key, key.rpartition(".")[0])}
    sections = "|".join(name for name in DistillConfig.model_fields if any(key.startswith(f"{name}.") for key in keys))
    named = re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:[:=` ][^`]*)?`", text)
    assert not missing + [key for key in named if key not in keys and not key.endswith((".py", ".jsonl"))]


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """The entry of each key in the site's reference: its help and its line of facts."""
    spec = importlib.util.spec_from_file_location("key_reference", ROOT / "docs" / "key_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = re.split(r"^### \S+ \{ #(\S+) \}$", module.key_reference(), flags=re.MULTILINE)
    return {key: text.split("\n## ")[0].strip() for key, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_reference_has_every_key_with_its_help(reference: dict[str, str]) -> None:
    keys = {key: " ".join(text.split()) for key, text in known_keys().items() if not key.endswith((".min", ".max"))}
    assert reference.keys() == keys.keys()
    assert not [key for key, text in keys.items() if text not in reference[key]]


@pytest.mark.parametrize(
    ("key", "facts"),
    [
        ("train.steps", "whole number (at least 1) or `null` · default `null`"),
        ("train.learning_rate", "number (above 0) · default `0.0001` · may be searched"),
        ("train.betas", "[number (at least 0, below 1), number (at least 0, below 1)] · default `[0.9, 0.999]`"),
        ("student.zero_stage", "`0` | `1` | `2` | `3` · default `2` · may change on resume · may be searched"),
        ("student.workers", "whole number or `{min: A, max: B}` · default `1`"),
        ("teacher.model", "text · required"),
        ("data.prompt_columns", "list of text (length at least 1) · default `[prompt]`"),
        ("student.lora.target_modules", "`all-linear` or list of text · default `all-linear`"),
        ("checkpoint.storage", "text or `null` · default `null`\n"),
        ("cache.directory", "text or `null` · default `null` · may change on resume\n"),
    ],
)
def test_facts_of_a_key(reference: dict[str, str], key: str, facts: str) -> None:
    assert facts in reference[key]


def test_every_loss_and_every_data_format_is_described() -> None:
    text = (ROOT / "docs" / "models-and-data.md").read_text(encoding="utf-8")
    choices = [*get_args(LossName), *get_args(DataConfig.model_fields["format"].annotation)]
    assert len(choices) > 8 and not [choice for choice in choices if f"`{choice}`" not in text]
    families = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "losses").glob("[!i]*.md"))]
    assert not [name for name in get_args(LossName) if not any(re.search(rf"\b{name}\b", page) for page in families)]
    assert not [
        page[:20] for page in families for part in ("source", "default", "**when to use") if part not in page.lower()
    ]


def test_the_drawing_in_light_and_in_dark_differs_in_its_colours_only() -> None:
    light, dark = (
        (ROOT / "docs" / "images" / f"parts-{scheme}.svg").read_text(encoding="utf-8") for scheme in ("light", "dark")
    )
    assert light != dark
    assert re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)
