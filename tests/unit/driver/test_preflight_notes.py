"""What is said before a run whose adaptive part cannot do anything."""

from typing import Any

import pytest

from taid_ray.config.schema import ScheduleConfig, build_config
from taid_ray.driver.preflight import preflight_notes
from taid_ray.models.vocabulary import Vocabulary
from taid_ray.scheduler.schedule import TAIDSchedule
from taid_ray.student.spec import DataCheck, RunSpec

SAME = Vocabulary(8, (), (), 8)


def said(steps: int = 250, loss: str = "taid", vocabulary: Vocabulary = SAME, **schedule: Any) -> list[str]:
    tree = {
        "teacher": {"model": "big"},
        "student": {"model": "small"},
        "data": {"train": "corpus.jsonl"},
        "loss": {"name": loss},
        "schedule": schedule,
        "train": {"steps": steps},
    }
    return preflight_notes(build_config(tree), RunSpec(steps, vocabulary, 0, DataCheck(10, 0, 0, 10)))


@pytest.mark.parametrize("mode", ["adaptive", "normalised"])
def test_a_short_run_at_the_published_alpha_is_named(mode: str) -> None:
    (note,) = said(mode=mode)
    assert "alpha 0.0005" in note and "250 steps" in note and f"{mode} t stays on its linear floor" in note


def test_normalised_moves_where_adaptive_does_not_yet() -> None:
    """alpha N = 1.5: half of it is too little, all of it is not."""
    assert said(mode="adaptive", alpha=0.006)
    assert not said(mode="normalised", alpha=0.006)
    assert said(mode="normalised", alpha=0.006, gain=0.1)


@pytest.mark.parametrize("mode", ["adaptive", "normalised"])
def test_the_alpha_named_is_where_t_leaves_the_floor(mode: Any) -> None:
    (note,) = said(mode=mode, alpha=1e-6)
    named = float(note.rpartition("from about ")[2].split()[0])
    for alpha, leaves in ((0.9 * named, False), (1.2 * named, True)):
        schedule = TAIDSchedule(ScheduleConfig(alpha=alpha, mode=mode), 250)
        floors = [schedule.update(3.0 * 0.999**n).floor_active for n in range(250)]
        assert (not all(floors[1:])) == leaves
        assert bool(said(mode=mode, alpha=alpha)) != leaves


@pytest.mark.parametrize("schedule", [{"mode": "linear"}, {"mode": "constant"}, {"mode": "adaptive", "alpha": 0.02}])
def test_nothing_is_said_otherwise(schedule: dict[str, Any]) -> None:
    assert not said(**schedule)
    assert not said(loss="forward_kl")


def test_renamed_special_tokens_are_listed() -> None:
    renamed = ((6, "<end>", "<eos>"), (7, "<user>", "<User>"))
    (note,) = said(loss="forward_kl", vocabulary=Vocabulary(8, (), (), 8, renamed))
    assert note.startswith("2 special token(s)") and note.endswith(
        ": 6 '<end>' becomes '<eos>', 7 '<user>' becomes '<User>'"
    )
