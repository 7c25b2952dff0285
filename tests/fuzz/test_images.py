"""Whatever stands for an image in a row: the right samples, or one clear error; in little memory, and soon."""

import json
import subprocess
import sys

from tests.support.feeding import SLOWEST_S
from tests.support.paths import ROOT

ROWS = 2000


def test_mutated_rows_with_images() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.image_rows", str(ROWS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["read"] + found["dropped"] + found["refused"] == ROWS
    assert found["read"] > 200 and found["dropped"] > 100 and found["refused"] > 200  # no check refuses everything
    assert found["slowest_s"] < SLOWEST_S and found["memory_mib"] < 500
