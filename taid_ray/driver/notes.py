"""What is said before a run starts: how the data were understood, and what is allowed but perhaps not meant."""

from collections.abc import Callable

from taid_ray.config.schema import DistillConfig
from taid_ray.scheduler.schedule import adaptive_is_linear, sigmoid
from taid_ray.student.spec import RunSpec

SHOWN_TOKENS = 20


def say_notes(config: DistillConfig, spec: RunSpec, say: Callable[[str], None], with_schedule: bool = True) -> None:
    """Says how the data were understood, then all notes. with_schedule: also those on the schedule's values."""
    for line in spec.data.description:
        say(line)
    schedule = schedule_notes(config, spec.total_steps) if with_schedule and spec.total_steps else []
    for note in [*model_notes(spec), *data_notes(config, spec), *loss_notes(config), *schedule]:
        say(f"note: {note}")


def model_notes(spec: RunSpec) -> list[str]:
    """Names the special tokens that the student takes from its teacher under another name."""
    renamed = spec.vocabulary.renamed
    if not renamed:
        return []
    names = ", ".join(f"{index} {student!r} becomes {teacher!r}" for index, student, teacher in renamed[:SHOWN_TOKENS])
    return [
        f"{len(renamed)} special token(s) have another name in the student's tokenizer than in the teacher's, which it takes "
        f"(student.resize_to_teacher), and begin as what the student knew under that id: {names}"
        + (", ..." if len(renamed) > SHOWN_TOKENS else "")
    ]


def data_notes(config: DistillConfig, spec: RunSpec) -> list[str]:
    """Counts the documents that are lost or cut short, and says what else may not be meant."""
    of_each = " of each source" if len(config.data.sources) > 1 else ""
    first = f"the first {config.data.block_documents}{of_each}"
    return [*spec.data.notes, *lost_documents(config, first, spec.data.dropped, spec.data.truncated)]


def lost_documents(config: DistillConfig, which: str, dropped: int, truncated: int) -> list[str]:
    """Says how many of `which` documents are lost or cut short; nothing if none is."""
    if not dropped and not truncated:
        return []
    rules = ", ".join(dict.fromkeys(source.overlong for source in config.data.sources))
    return [
        f"of {which} documents, {dropped:,} are left out (empty, too long, or nothing left of the response) and {truncated:,} "
        f"are cut short (data.overlong: {rules}); a larger data.sequence_length keeps more"
    ]


FAULTS = {
    "adaptive_kl": "the head is in another order of the ids than the gaps, and gradients flow through the weight",
    "ctkd": "the temperature is in no optimizer and stays as it is at the start",
    "dkd": "the sum is divided by all positions, those without loss included",
}
"""What is wrong with losses in TAID's published code."""


def loss_notes(config: DistillConfig) -> list[str]:
    """Says that a loss is computed wrongly on purpose."""
    name = config.loss.name
    if not config.loss.published:
        return []
    return [
        f"loss.published: {name} is computed with the faults of TAID's published code ({FAULTS[name]}), for comparison "
        "only; remove the key to get the right loss"
    ]


def schedule_notes(config: DistillConfig, total_steps: int) -> list[str]:
    """Names a schedule whose alpha does nothing."""
    schedule, t_start, t_end = config.schedule, config.schedule.t_start, config.schedule.t_end
    has_alpha = config.loss.is_taid and schedule.mode in ("adaptive", "normalised", "exponential")
    gain = schedule.gain if schedule.mode == "normalised" else 0.0
    if not has_alpha or t_start == t_end or not adaptive_is_linear(t_start, t_end, schedule.alpha, total_steps, gain):
        return []
    enough = (t_end - t_start) / ((1 - t_start) * total_steps * sigmoid(gain))
    # An exponential t moves one step earlier than the floor does.
    place = "within a step of" if schedule.mode == "exponential" else "on"
    return [
        f"with schedule.alpha {schedule.alpha:g} and {total_steps} steps, {schedule.mode} t stays {place} its linear floor; "
        f"from about {enough:.2g} on it can leave it"
    ]
