"""What is said before a run: how its data were understood, and a schedule whose adaptive part cannot do anything."""

from typing import Any

import pytest

from taid_ray.config.objective import PUBLISHED, ScheduleConfig
from taid_ray.config.schema import build_config
from taid_ray.driver.notes import say_notes
from taid_ray.models.vocabulary import Vocabulary
from taid_ray.scheduler.schedule import TAIDSchedule
from taid_ray.student.spec import DataCheck, RunSpec

SAME = Vocabulary(8, (), (), 8)


TREE = {"teacher": {"model": "big"}, "student": {"model": "small"}, "data": {"train": "corpus.jsonl"}}


def said(
    steps: int = 250, loss: str = "taid", vocabulary: Vocabulary = SAME, published: bool = False, **schedule: Any
) -> list[str]:
    config = build_config(
        TREE | {"loss": {"name": loss, "published": published}, "schedule": schedule, "train": {"steps": steps}}
    )
    lines: list[str] = []
    say_notes(config, RunSpec(steps, vocabulary, 0, DataCheck(10, 0, 0, 10)), lines.append)
    return lines


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_loss_that_is_wrong_on_purpose_is_named(name: str) -> None:
    (note,) = said(loss=name, published=True)
    assert f"loss.published: {name}" in note and "faults" in note and "for comparison only" in note
    assert not said(loss=name)


@pytest.mark.parametrize("mode", ["adaptive", "normalised"])
def test_a_short_run_at_the_published_alpha_is_named(mode: str) -> None:
    (note,) = said(mode=mode)
    assert "alpha 0.0005" in note and "250 steps" in note and f"{mode} t stays on its linear floor" in note


def test_a_short_exponential_run_is_named() -> None:
    (note,) = said(mode="exponential")
    assert "exponential t stays within a step of its linear floor" in note and not said(mode="exponential", alpha=0.02)


@pytest.mark.parametrize("alpha", [0.001, 0.0039])
def test_a_short_exponential_run_stays_within_a_step_of_its_floor(alpha: float) -> None:
    assert said(mode="exponential", alpha=alpha)
    schedule = TAIDSchedule(ScheduleConfig(alpha=alpha, mode="exponential"), 250)
    lead = [schedule.update(3.0).t - (0.4 + 0.6 * n / 250) for n in range(250)]
    assert max(lead) <= 0.6 / 250 + 1e-12


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
    assert note.startswith("note: 2 special token(s)") and note.endswith(
        ": 6 '<end>' becomes '<eos>', 7 '<user>' becomes '<User>'"
    )


@pytest.mark.parametrize("with_schedule", [True, False])
def test_the_data_are_described_first_and_what_is_lost_of_them_is_said_to_a_search_too(with_schedule: bool) -> None:
    spec = RunSpec(250, SAME, 0, DataCheck(10, 3, 0, 10, ["data.train: corpus.jsonl: 1 file"]))
    lines: list[str] = []
    say_notes(build_config(TREE | {"train": {"steps": 250}}), spec, lines.append, with_schedule)
    assert lines[0] == "data.train: corpus.jsonl: 1 file"
    assert lines[1].startswith("note: of the first 1024 documents, 3 are left out")
    assert [line for line in lines[2:] if "linear floor" in line] == lines[2:] and len(lines[2:]) == with_schedule
