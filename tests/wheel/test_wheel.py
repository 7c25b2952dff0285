"""A wheel, made as a release is and installed into an empty environment outside of the clone, runs the quickstart."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.paths import PACKAGE, ROOT

pytestmark = pytest.mark.more
ENVIRONMENT = {"COLUMNS": "100"} | {
    key: value
    for key, value in os.environ.items()
    if key not in ("COLUMNS", "PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV")
}
"""Without the clone on Python's path, which tests/conftest.py puts there."""


def run(command: list[str], directory: Path, timeout_s: float) -> str:
    """Standard output of a command in `directory`. Fails with all of its output if the command does."""
    done = subprocess.run(
        command,
        cwd=directory,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, of what git knows and of what is new: not of build directories of before."""
    home = tmp_path_factory.mktemp("wheel")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT, 60).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).exists():
            (home / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / "source" / name).write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-m", "build", "--outdir", str(home / "dist"), "source"], home, 300)
    (found,) = (home / "dist").glob("*.whl")
    return found


@pytest.mark.timeout(400)
def test_it_holds_the_whole_package(wheel: Path) -> None:
    held = {name for name in ZipFile(wheel).namelist() if name.startswith("taid_ray/")}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert held == {path.relative_to(ROOT).as_posix() for path in files}


@pytest.mark.timeout(1500)
def test_it_runs_the_quickstart_where_nothing_else_is(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=True)
    python = str(tmp_path / "empty/bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    run([*install, "torch"], tmp_path, 900)
    run([*install, str(wheel)], tmp_path, 900)
    (tmp_path / "elsewhere").mkdir()
    where = run([python, "-c", "import taid_ray; print(taid_ray.__file__)"], tmp_path / "elsewhere", 60)
    assert where.startswith(str(tmp_path / "empty"))
    told = run([str(tmp_path / "empty/bin/taid-ray"), "quickstart"], tmp_path / "elsewhere", 600)
    (directory,) = (tmp_path / "elsewhere/runs").glob("quickstart-*")  # beside it are the encoded data
    summary = json.loads((directory / "summary.json").read_text())
    for row, figures in (("student before", summary["before"]), ("student after", summary["after"])):
        assert re.search(rf"{row}.*{figures['cross_entropy']:.4f}.*{figures['kl']:.4f}", told), told
    assert summary["after"]["kl"] < summary["before"]["kl"] / 2
    assert (directory / "model/model.safetensors").exists()

    told = run(
        [str(tmp_path / "empty/bin/taid-ray"), "quickstart", "--vision", "train.steps=12"], tmp_path / "elsewhere", 600
    )
    assert re.search(r"student after .*shown", told), told
    assert len([*(tmp_path / "elsewhere/runs").glob("quickstart-vision-*/contact_sheet.png")]) == 1
