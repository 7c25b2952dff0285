"""The build trap: a lock that a killed compiler left behind, on which DeepSpeed on a CPU would wait forever.

A worker declares the operator absent (`deepspeed_internals.use_deepspeed_on`), so it neither compiles nor
waits, whatever lies there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

OPERATOR = "deepspeed_shm_comm"
WITHIN_S = 120
"""For a process that imports torch and DeepSpeed on a busy machine; a build, or a lock, takes longer."""

# What a worker's process does, from Ray Train's process group to the student's first step. `trapped` stands for the wait.
PROCESS = """
import os, sys, torch
import torch.utils.file_baton
as_worker, store = sys.argv[1] == "worker", sys.argv[2]

def trapped(baton):
    print("waits for", baton.lock_file_path, flush=True)
    os._exit(3)

torch.utils.file_baton.FileBaton.wait = trapped
if as_worker:
    from taid_ray.student.deepspeed_internals import use_deepspeed_on
    use_deepspeed_on("cpu")
os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=0, world_size=1)
from taid_ray.distributed.world import World
from taid_ray.models.student_init import build_student
from taid_ray.student.clock import PhaseClock
from taid_ray.student.engine import Student
from tests.support.students import TIED, config_for
config, device = config_for(TIED), torch.device("cpu")
student = Student(config, build_student(config, None), 512, World.current(), device)
student.backward(sum(p.float().sum() for p in student.trained.parameters()))
print("norm", student.step(1e-3), flush=True)
"""


def run_process(kind: str, extensions: Path) -> tuple[int, str]:
    """Exit code and output of a fresh process whose extensions are built in `extensions`."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("DS_ACCELERATOR", None)
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, kind, str(extensions.with_name(f"store-{kind}"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    return done.returncode, done.stdout + done.stderr


def content(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in directory.rglob("*")
    }


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A directory of extensions as a process leaves it that is killed while it builds the operator."""
    extensions = tmp_path / "extensions"
    (extensions / OPERATOR).mkdir(parents=True)
    (extensions / OPERATOR / "lock").touch()
    return extensions


def test_a_stale_lock_does_not_hold_a_worker(locked: Path) -> None:
    before = content(locked)
    code, output = run_process("worker", locked)
    assert code == 0, output
    assert "norm" in output and "built successfully" not in output
    assert content(locked) == before


@pytest.mark.skipif(not shutil.which("ninja") or not shutil.which("c++"), reason="needs ninja and a C++ compiler")
def test_the_lock_is_where_deepspeed_looks(locked: Path) -> None:
    """Without the declaration DeepSpeed does wait for this very lock, so the test above tests something."""
    code, output = run_process("plain", locked)
    assert code == 3, output
    assert f"waits for {locked / OPERATOR / 'lock'}" in output
