"""What all variants of benchmarks.step share: models, tokens, settings, and how a process is watched."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from taid_ray.config.models import TeacherConfig
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.batch import Batch, collate
from taid_ray.data.dataset import TrainingData
from taid_ray.models.loading import load_tokenizer

BUNDLED_TEXT = ROOT / "taid_ray" / "quickstart" / "tinystories_train.jsonl"
SYNTHETIC_IDS = 32_000
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.01, 1.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Case:
    """One problem, on disk: directories `teacher` and `student`, files `train.jsonl` and `valid.jsonl`."""

    directory: Path
    tokenizer: str
    """Where the vocabulary and the text come from, in words."""
    vocabulary: int
    steps: int
    """That every variant takes, the warm-up included."""
    window: int
    """Further steps that taid-ray takes, in which its teacher pool has nothing left to do."""
    rows: int = 8
    length: int = 256

    @property
    def teacher(self) -> str:
        return str(self.directory / "teacher")

    @property
    def student(self) -> str:
        return str(self.directory / "student")

    @property
    def tokens(self) -> int:
        """Per step; all but one of each row carry loss."""
        return self.rows * self.length


@dataclass(frozen=True)
class Outcome:
    """What was measured of one run of a variant."""

    step_s: list[float]
    """Wall seconds of each step."""
    cpu_s: list[float]
    """CPU seconds of each step, of all threads of student and teacher."""
    first_loss: float
    idle_bytes: dict[str, int]
    """Resident size of each process before the first step, by role; "student" alone if it computes the teacher too."""
    extra_bytes: dict[str, int]
    """Peak resident size of each process while it trained, over its idle size."""


class Watched:
    """A process, from now on: its idle size is what it has now. Linux; the process must be this user's."""

    def __init__(self, pid: int | str = "self"):
        self._proc = Path(f"/proc/{pid}")
        self.idle_bytes = self._memory("VmRSS")
        (self._proc / "clear_refs").write_text("5")  # VmHWM starts again at VmRSS

    def extra_bytes(self) -> int:
        """Peak resident size so far over the idle size."""
        return max(0, self._memory("VmHWM") - self.idle_bytes)

    def cpu_s(self) -> float:
        """CPU seconds of all threads since the process started."""
        user, system = (self._proc / "stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / CLOCK_TICKS

    def _memory(self, key: str) -> int:
        found = re.search(rf"^{key}:\s+(\d+) kB$", (self._proc / "status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found.group(1)) * 1024


def make_case(directory: Path, tokenizer: str | None, steps: int, window: int) -> Case:
    """Writes two models with random weights, and documents that each fill one row.

    tokenizer: a directory with a real one, for the bundled stories; None: 32,000 made-up words.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    source = f"{Path(tokenizer).name}'s tokenizer on TinyStories" if tokenizer else "a synthetic vocabulary"
    chosen = load_tokenizer(TeacherConfig(model=tokenizer)) if tokenizer else synthetic_tokenizer()
    case = Case(directory, source, len(chosen), steps, window)
    set_seed(0)
    for path, layers, width in ((case.teacher, 8, 512), (case.student, 4, 256)):
        config = LlamaConfig(
            vocab_size=case.vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=case.length,
            initializer_range=0.05,  # at the usual 0.02 two random models hardly differ, and any loss would agree
            bos_token_id=chosen.bos_token_id,
            eos_token_id=chosen.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(path)
        chosen.save_pretrained(path)
    texts = bundled_texts(chosen, case.length) if tokenizer else synthetic_texts(case.length)
    valid, *train = islice(texts, 1 + (steps + window) * case.rows)
    (directory / "valid.jsonl").write_text(json.dumps({"text": valid}) + "\n")
    (directory / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in train))
    return case


def synthetic_tokenizer() -> Any:
    """SYNTHETIC_IDS words, one id each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, SYNTHETIC_IDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def synthetic_texts(length: int) -> Iterator[str]:
    """Documents of `length` tokens, end of document included, that walk through all ids."""
    for document in count():
        ids = range(document * (length - 1), (document + 1) * (length - 1))
        yield " ".join(f"w{1 + i * 7919 % (SYNTHETIC_IDS - 1)}" for i in ids)


def bundled_texts(tokenizer: Any, length: int) -> Iterator[str]:
    """Beginnings of the bundled stories that give `length` tokens, end of document included."""
    stories = [json.loads(line)["text"] for line in BUNDLED_TEXT.read_text(encoding="utf-8").splitlines()]
    for first, second in zip(stories[::2], stories[1::2], strict=False):
        text = f"{first}\n{second}"
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) < length:
            continue
        text = text[: offsets[length - 2][1]]
        if len(tokenizer(text)["input_ids"]) == length - 1:  # a word that was cut may be tokenised otherwise
            yield text


def settings(case: Case, out: Path, values: dict[str, Any]) -> DistillConfig:
    """The configuration of a run of this case. values: further dotted keys."""
    tree = {
        "name": "bench-step",
        "out": str(out),
        "device": "cpu",
        "teacher": {"model": case.teacher, "dtype": "float32", "window": case.window},
        "student": {"model": case.student, "dtype": "float32"},
        "data": {
            "train": str(case.directory / "train.jsonl"),
            "valid": str(case.directory / "valid.jsonl"),
            "sequence_length": case.length,
        },
        "loss": {"name": "forward_kl"},
        "train": {
            "steps": case.steps + case.window,
            "batch_size": case.rows,
            "micro_batch_size": case.rows,
            "learning_rate": LEARNING_RATE,
            "lr_schedule": "constant",
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": MAX_GRAD_NORM,
        },
    }
    return build_config(tree, values=values)


def batches(case: Case) -> list[Batch]:
    """The batches of a run of this case, in its order."""
    config = settings(case, case.directory, {})
    data = TrainingData(config.data.sources[0], load_tokenizer(config.given_teacher), config.train.seed, case.rows)
    found = [collate(rows) for rows, _ in islice(data.batches(), case.steps)]
    for batch in found:
        assert batch.inputs["input_ids"].shape == (case.rows, case.length), "a document does not fill its row"
        assert batch.num_loss_tokens == case.rows * (case.length - 1)
    return found
