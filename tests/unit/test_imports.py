"""What a fresh interpreter loads: libraries that light rooms must not bring along, and the package's public names.

Who may import whom is import-linter's (`make lint`); it reads the sources, and cannot see what a library imports in turn.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import taid_ray
from tests.support.paths import ROOT

CONTRACTS = {
    contract["id"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
}
CALLS = """
import sys, tempfile
from pathlib import Path
from types import ModuleType
import taid_ray
from taid_ray.errors import TaidRayError

quickstart = Path(taid_ray.__file__).parent / "configs/quickstart.yaml"
tree = {"teacher": {"model": "/absent/teacher"}, "student": {"model": "/absent/student"}, "data": {"train": "/absent/data"},
        "train": {"steps": 2}, "out": tempfile.mkdtemp() + "/run"}
space = {"search": "grid", "space": {"train.learning_rate": {"choice": [1e-3, 1e-4]}}}
Path(sys.argv[1]).write_text("search: grid\\nspace: {train.learning_rate: {choice: [0.001, 0.0001]}}\\n")

def refused(call, *arguments):
    try:
        call(*arguments)
    except TaidRayError as error:
        assert "/absent" in str(error), error
    else:
        raise AssertionError(f"{call} accepted models that are not there")

calls = {
    "CompareResult": lambda call: call(Path("c"), None),
    "DistillConfig": lambda call: call.model_validate(tree),
    "RunResult": lambda call: call(Path("r"), {}),
    "SearchResult": lambda call: call(Path("s"), None),
    "Space": lambda call: call.model_validate(space),
    "build_config": lambda call: call(tree),
    "distill": lambda call: refused(call, taid_ray.build_config(tree)),
    "load_config": lambda call: call(quickstart),
    "load_space": lambda call: call(sys.argv[1]),
    "run_compare": lambda call: refused(call, taid_ray.build_config(tree), ["taid"]),
    "run_search": lambda call: refused(call, taid_ray.build_config(tree), taid_ray.Space.model_validate(space)),
}
assert sorted(calls) == sorted(taid_ray.__all__)
for _ in range(2):
    for name in taid_ray.__all__:
        found = getattr(taid_ray, name)
        assert not isinstance(found, ModuleType), name
        calls[name](found)
"""


def run_fresh(code: str, *arguments: str) -> str:
    """Standard output of a new interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def with_submodules(name: str) -> list[str]:
    """A module's name and, of a package, those of everything in it."""
    module = importlib.import_module(name)
    found = pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}.")
    return [name, *(info.name for info in found)]


@pytest.mark.parametrize("contract", ["no-model-library", "no-torch"])
def test_light_rooms_load_no_heavy_library(contract: str) -> None:
    """A wrong configuration is refused within a blink, and a loss or a schedule can be used alone."""
    rule = CONTRACTS[contract]
    modules = [found for name in rule["source_modules"] for found in with_submodules(name)]
    forbidden = {*rule["forbidden_modules"], "ray"}
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    assert run_fresh(f"{code}print(*sorted({forbidden!r} & set(sys.modules)))").split() == []


def test_losses_can_be_used_without_the_rest() -> None:
    code = "import sys\nfrom taid_ray.losses import chunked_loss, Projection, LogitTransform, TopK, chunk_tokens_for\n"
    loaded = run_fresh(f"{code}print(*sys.modules)").split()
    assert "torch" in loaded
    assert not {"ray", "deepspeed", "transformers", "datasets", "peft"} & {*loaded}
    assert {name for name in loaded if name.startswith("taid_ray.")} <= {
        *with_submodules("taid_ray.losses"), *with_submodules("taid_ray.config"), "taid_ray.errors", "taid_ray.files",
    }  # fmt: skip


def test_checking_a_run_does_not_load_deepspeed() -> None:
    """It would settle its accelerator before a worker does, and say so on every command's terminal."""
    code = """
import sys
from taid_ray.cli.quickstart import quickstart_config
from taid_ray.driver.preflight import prepare
adapted = "student={init: scratch, architecture: {num_hidden_layers: 1}, lora: {rank: 2}}"
prepare(quickstart_config([adapted], "unused"))
print("deepspeed" in sys.modules)
"""
    assert run_fresh(code) == "False\n"


def test_public_names_are_no_subpackages() -> None:
    """`from taid_ray import search` would find the package as soon as anything has imported it."""
    assert not {*taid_ray.__all__} & {info.name for info in pkgutil.iter_modules(taid_ray.__path__)}


def test_every_public_name_can_be_called_twice(tmp_path: Path) -> None:
    """In one interpreter, so that the second round finds all sub-packages imported that the first one needed."""
    run_fresh(CALLS, str(tmp_path / "space.yaml"))


def test_every_directory_with_code_is_a_package_that_says_what_it_is_for() -> None:
    """Without an `__init__.py` the wheel would leave it out."""
    package = ROOT / "taid_ray"
    for directory in sorted({path.parent for path in package.rglob("*.py")}):
        name = ".".join(directory.relative_to(ROOT).parts)
        assert (directory / "__init__.py").exists(), name
        assert (importlib.import_module(name).__doc__ or "").strip(), f"{name} has no docstring"


def test_private_parts_of_ray_and_deepspeed_are_used_in_one_module_each() -> None:
    """Those modules are what must be read again before the upper bounds in pyproject.toml move."""
    allowed = {"ray": "distributed/ray_internals.py", "deepspeed": "student/deepspeed_internals.py"}
    private = re.compile(
        r"^\s*(?:from|import)\s+(ray|deepspeed)\.(?:\S*\.)?_|^\s*from\s+(ray|deepspeed)\S*\s+import\s+.*\b_\w"
    )
    attribute = re.compile(
        r"\b(ray|deepspeed)(?:\.\w+)*\._\w|\.optimizer\._|\bds_(?:shape|numel|tensor|id|status)\b|_groups_flat\b|\b_actor_id\b"
    )
    for path in sorted((ROOT / "taid_ray").rglob("*.py")):
        here = path.relative_to(ROOT / "taid_ray").as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found = private.search(line) or attribute.search(line)
            if found and '"' not in line.partition(found[0])[0]:
                library = next((name for name in found.groups() if name), "deepspeed")
                if (here, found[0]) == ("teacher/pool/autoscaling.py", "_actor_id"):
                    continue  # Serve's controller gets this class by value, without our package: see ray_internals
                assert here == allowed[library], f"{here}:{number} uses what {library} keeps private: {line.strip()}"
