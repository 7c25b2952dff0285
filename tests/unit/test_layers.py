"""Imports point down only: pure modules below those of one process, both below the Ray glue."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "taid_ray"

# Modules and subpackages directly under taid_ray/. List a new one here, as low as its imports allow.
WITHOUT_TORCH = {
    "aggregate", "bottleneck", "claims", "config", "config_text", "errors", "hardware", "plan_sizes", "plan_time", "run_log",
    "sampler", "schedule", "simulate", "simulate_kernel", "simulate_pipeline",
    "space",
}  # fmt: skip
LAYERS = {
    # P: pure. torch at most.
    "P": WITHOUT_TORCH | {"batch", "chunked", "clock", "losses", "packing", "plan_memory", "samples", "wire"},
    # 1: one process. No ray.
    "1": {
        "cache", "cache_store", "cached_teacher", "chat", "checkpoint", "data",
        "device", "documents", "encoding", "evaluate", "example", "figures", "html_page", "hub", "live_file", "measure",
        "metrics",
        "models", "payload", "plan", "plan_case", "plan_measured", "plan_notes", "plan_rates", "plan_tables", "plan_trace",
        "plan_worker",
        "preflight", "progress", "record", "report", "restoring", "run_dir",
        "run_history", "run_notes", "run_plots", "run_report", "run_status", "saving",
        "search_notes", "search_plots", "search_report", "search_results", "search_statistics", "stream", "student",
        "student_model", "student_state", "teacher_model", "to_device", "trackers", "tracking", "train", "trial_book",
        "vocabulary", "warmed", "world",
    },
    # R: Ray glue and entry points.
    "R": {
        "__init__", "actors", "attempts", "between", "cache_commands", "cli", "cluster", "collectives", "launch", "plan_command",
        "plan_measure", "plan_watch",
        "job", "jobs", "report_command", "run_commands", "stop", "submit",
        "search_watch", "supervise", "trial", "tune", "warm", "worker",
    },
}  # fmt: skip
ORDER = "P1R"
FORBIDDEN = {"P": {"ray", "deepspeed", "transformers", "datasets", "peft"}, "1": {"ray"}, "R": set()}

SOURCES = sorted(PACKAGE.rglob("*.py"))
PURE_SOURCES = [path for path in SOURCES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in LAYERS["P"]]


def top_name(parts: tuple[str, ...]) -> str:
    """`("losses", "taid")` -> `losses`; the package itself is `__init__`."""
    return parts[0] if parts else "__init__"


def layer_of(name: str) -> str | None:
    return next((layer for layer, names in LAYERS.items() if name in names), None)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported, also inside functions and under `if TYPE_CHECKING`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            if node.level:
                base = base[: len(base) - node.level + is_package]
                prefix = ".".join([*base, node.module] if node.module else base)
            else:
                prefix = node.module or ""
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with one module's imports, one line each."""
    own = layer_of(top_name(tuple(module.split(".")[1:])))
    assert own, f"{module}: unknown layer"
    found = []
    for line, name in imports_of(ast.parse(source), module, is_package):
        root, *rest = name.split(".")
        if root in FORBIDDEN[own]:
            found.append(f"{module}:{line} imports {root}, which is not allowed in layer {own}")
        if root != "taid_ray":
            continue
        # `from taid_ray import X`: X is a listed module, or else a name of the package's own __init__.
        target = rest[0] if rest and layer_of(rest[0]) else "__init__"
        other = layer_of(target)
        if other and ORDER.index(other) > ORDER.index(own):
            found.append(
                f"{module}:{line} (layer {own}) imports taid_ray.{target} (layer {other}): imports point down only"
            )
    return found


def test_every_module_has_a_layer() -> None:
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES}
    unknown = sorted(name for name in names if layer_of(name) is None)
    assert not unknown, f"add {unknown} to one layer of LAYERS in {Path(__file__).relative_to(PACKAGE.parent)}"


def test_every_module_has_one_layer_only() -> None:
    names = [name for layer in LAYERS.values() for name in layer]
    assert len(names) == len(set(names))


def test_directories_with_code_are_packages() -> None:
    missing = sorted({str(path.parent) for path in SOURCES if not (path.parent / "__init__.py").exists()})
    assert not missing, f"without __init__.py the wheel leaves these out: {missing}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    if layer_of(top_name(tuple(module.split(".")[1:]))) is None:
        pytest.skip("no layer; test_every_module_has_a_layer says so")
    assert not violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("taid_ray.train", "import ray"),
        ("taid_ray.train", "def f():\n    from ray.train import report"),
        ("taid_ray.losses.taid", "import transformers.models"),
        ("taid_ray.losses.taid", "from ..data import x"),
        ("taid_ray.batch", "from taid_ray import data"),
        ("taid_ray.data", "from taid_ray.actors.scheduler import Scheduler"),
        ("taid_ray.data", "from taid_ray import __version__"),
        ("taid_ray.data", "from . import actors"),
    ],
)
def test_the_check_sees_upward_imports(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("taid_ray.train", "from taid_ray.batch import Batch\nimport torch\nfrom taid_ray.world import World"),
        ("taid_ray.losses.taid", "from .divergences import kl\nfrom taid_ray.losses import taid"),
        ("taid_ray.actors.pool", "import ray\nfrom taid_ray.teacher_model import TeacherModel"),
        ("taid_ray.data", "import raytracer"),
    ],
)
def test_the_check_allows_downward_imports(module: str, source: str) -> None:
    assert violations(source, module) == []


def loaded_after_importing(modules: list[str], forbidden: set[str]) -> list[str]:
    """Which of the forbidden libraries a fresh interpreter has in memory once it imported the modules."""
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"print(*sorted({forbidden!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_pure_modules_load_no_framework() -> None:
    modules = [module_name(path) for path in PURE_SOURCES]
    assert loaded_after_importing(modules, FORBIDDEN["P"]) == []


def test_configuration_and_schedule_load_no_torch() -> None:
    """A wrong configuration is refused within a blink, and the schedule can be studied without torch."""
    modules = [f"taid_ray.{name}" for name in sorted(WITHOUT_TORCH)]
    assert loaded_after_importing(modules, FORBIDDEN["P"] | {"torch"}) == []
