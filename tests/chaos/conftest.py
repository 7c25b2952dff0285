"""Runs for the tests to hurt, and one that nobody hurts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import LOG_TAIL, NewRun, Run, Tree, small_config


@pytest.fixture
def new_run(ray_cluster: str, tmp_path: Path) -> Iterator[NewRun]:
    """Makes runs; ends those that a failed test leaves behind. pytest shows their logs if the test failed."""
    made: list[Run] = []

    def make(config: Tree) -> Run:
        made.append(Run(tmp_path / f"{config['name']}-{len(made)}", config))
        return made[-1]

    yield make
    for run in made:
        run.close()
        print(f"== the end of the log of {run.dir}\n{run.log[-LOG_TAIL:]}")


@pytest.fixture(scope="session")
def baseline(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """An undisturbed run of `small_config`."""
    run = Run(tmp_path_factory.mktemp("baseline") / "baseline", small_config("chaos-baseline"))
    run.start()
    try:
        run.wait_for_end()
        yield run
    finally:
        run.close()
