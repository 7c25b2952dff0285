"""A run whose data have images is hurt, and ends with the weights of one that nobody touched, bit for bit."""

from pathlib import Path
from random import Random

import pytest

from tests.support.failures import KILLED_DRIVER, KILLED_RANK, KILLED_REPLICA, inflict
from tests.support.harness import NewRun, Tree, check_same_result, small_config
from tests.support.image_runs import image_keys, write_image_rows
from tests.support.tiny_vision import save_tiny


def config(name: str, directory: Path) -> Tree:
    """Of `small_config`, with models that see; ZeRO-3 and micro-batches of one row, so that many have no image. Checkpoints are
    without the tower, which is frozen.
    """
    model = {seed: str(directory / f"model{seed}") for seed in (0, 1)}
    return small_config(
        name,
        teacher={"model": model[0]},
        student={"model": model[1], "init": "pretrained", "layers": None, "zero_stage": 3, "freeze": ["vision_tower"]},
        data=image_keys(directory)
        | {"valid": None, "sequence_length": 256, "valid_documents": 6, "sees_at_least": 0.0},
        train={"steps": 24, "batch_size": 6, "micro_batch_size": 1, "eval_every": 10},
    )


@pytest.mark.more
@pytest.mark.timeout(900)
def test_a_replica_a_rank_and_the_driver_killed(new_run: NewRun, tmp_path: Path) -> None:
    write_image_rows(tmp_path, 36)
    for seed in (0, 1):
        save_tiny("internvl", tmp_path / f"model{seed}", seed)
    untouched, run = (new_run(config(name, tmp_path)) for name in ("images-untouched", "images-hurt"))
    untouched.start()
    untouched.wait_for_end()
    run.start()
    rng = Random(7)
    for step, failure in ((4, KILLED_REPLICA), (10, KILLED_RANK), (16, KILLED_DRIVER)):
        inflict(run, failure, step, rng)
    run.wait_for_end()
    run.check_nothing_left()
    check_same_result(run, untouched)
    images = [[line["images"] for line in each.lines()] for each in (run, untouched)]
    assert images[0] == images[1] and max(images[0]) > 0
    assert all(line["seeing"] > 0 for line in run.summary["validations"])
