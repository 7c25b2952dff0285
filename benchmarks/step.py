"""The whole step: taid-ray against a plain PyTorch loop and against TRL's GKDTrainer, on the same two cores.

    python -m benchmarks.step [--tokenizer DIR] [--rounds 2] [--steps 3]

Same models (random weights), tokens, loss (forward KL, off-policy), AdamW and float32. Each variant runs in a process of
its own, all of them in turn, for several rounds; figures are medians over the steps after the warm-up of all rounds.
Without a tokenizer the vocabulary is 32,000 made-up words. TRL's row needs the extra `bench`.

Extra memory of a process is its peak resident size while it trains, less its idle size: what it has when models, trainer
or engine exist and the first step is about to begin.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from benchmarks.common import in_fresh_process, median, write
from benchmarks.step_case import Case, Outcome, make_case
from benchmarks.step_plain import train_plain
from benchmarks.step_taid import train_taid
from benchmarks.step_trl import train_trl, trl_is_installed

CORES = 2
WARM_UP, WINDOW = 1, 2
LOSS_TOLERANCE = 1e-3
MIB = 2**20

TRL, PLAIN, CHUNKED, POOL, LOCAL = "TRL", "plain", "plain, chunked loss", "taid-ray", "taid-ray, local teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole step")
    parser.add_argument("--tokenizer", help="directory with a tokenizer, instead of made-up words")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="steps per round after the warm-up")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    os.environ.pop("OMP_NUM_THREADS", None)
    with TemporaryDirectory() as directory:
        case = make_case(Path(directory), arguments.tokenizer, WARM_UP + arguments.steps, WINDOW)
        report(case, measured(case, arguments.rounds))


def measured(case: Case, rounds: int) -> dict[str, list[Outcome]]:
    """Outcomes of every variant, one for each round."""
    variants: dict[str, tuple[Any, ...]] = {
        TRL: (train_trl, case),
        PLAIN: (train_plain, case, False),
        CHUNKED: (train_plain, case, True),
        POOL: (train_taid, case, {}),
        LOCAL: (train_taid, case, {"teacher.mode": "local"}),
    }
    if not trl_is_installed():
        del variants[TRL]
    found: dict[str, list[Outcome]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, call in variants.items():
            print(f"round {turn + 1} of {rounds}: {name}", flush=True)
            found[name].append(in_fresh_process(*call))
    return found


def report(case: Case, found: dict[str, list[Outcome]]) -> None:
    losses = {name: outcomes[0].first_loss for name, outcomes in found.items()}
    assert max(losses.values()) - min(losses.values()) <= LOSS_TOLERANCE, f"first losses differ: {losses}"
    figures = {name: figures_of(case, outcomes) for name, outcomes in found.items()}
    result = {
        "case": {"tokenizer": case.tokenizer, "vocabulary": case.vocabulary, "tokens": case.tokens, "cores": CORES},
        "variants": {name: figures[name] | {"runs": [asdict(run) for run in found[name]]} for name in found},
        "ratios": {name: ratios(figures[name], figures) for name in (POOL, LOCAL)},
    }
    write("step", result, [figures_table(case, figures), ratios_table(figures)])


def figures_of(case: Case, outcomes: list[Outcome]) -> dict[str, Any]:
    """Medians over the measured steps of all rounds for times, over the rounds for memory."""
    step_s = median([seconds for run in outcomes for seconds in run.step_s[WARM_UP:]])
    return {
        "step_s": step_s,
        "tokens_per_s": case.tokens / step_s,
        "cpu_s": median([seconds for run in outcomes for seconds in run.cpu_s[WARM_UP:]]),
        "first_loss": outcomes[0].first_loss,
        "idle_mib": {role: median([run.idle_bytes[role] / MIB for run in outcomes]) for role in outcomes[0].idle_bytes},
        "student_mib": median([run.extra_bytes["student"] / MIB for run in outcomes]),
        "together_mib": median([sum(run.extra_bytes.values()) / MIB for run in outcomes]),
    }


def ratios(taid: dict[str, Any], figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the targets are about, for one of taid-ray's variants."""
    found = {
        "tokens/s, of the plain loop with the chunked loss": taid["tokens_per_s"] / figures[CHUNKED]["tokens_per_s"]
    }
    if TRL in figures:
        trl = figures[TRL]
        found["tokens/s, of TRL's"] = taid["tokens_per_s"] / trl["tokens_per_s"]
        found["extra memory of the student process, of TRL's"] = taid["student_mib"] / trl["student_mib"]
        found["extra memory of student and teacher, of TRL's"] = taid["together_mib"] / trl["together_mib"]
    return found


TARGETS = {
    "tokens/s, of the plain loop with the chunked loss": ">= 0.9",
    "tokens/s, of TRL's": ">= 1.5",
    "extra memory of the student process, of TRL's": "<= 0.35",
    "extra memory of student and teacher, of TRL's": "<= 0.5",
}


def figures_table(case: Case, figures: dict[str, dict[str, Any]]) -> Table:
    left_out = "" if TRL in figures else " TRL is not installed (pip install taid-ray[bench]), so its row is left out."
    table = Table(
        title="One step of forward-KL distillation on two cores",
        caption=f"Student Llama 4 x 256, teacher Llama 8 x 512, {case.tokens:,} tokens in {case.rows} rows, "
        f"{case.vocabulary:,} ids ({case.tokenizer}), float32, AdamW. Extra memory: peak resident size while training less "
        "idle size, which is that before the first step, when models and trainer or engine exist (DeepSpeed's, which has "
        f"made the optimizer's state by then, the others have not).{left_out}",
    )
    for column in ("variant", "step, s", "tokens/s", "CPU s per step", "loss of step 1"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for column in ("idle, MiB", "extra: student, MiB", "student + teacher, MiB"):
        table.add_column(column, justify="right")
    for name, one in figures.items():
        idle = " + ".join(f"{mib:.0f}" for mib in one["idle_mib"].values())
        table.add_row(
            name,
            f"{one['step_s']:.2f}",
            f"{one['tokens_per_s']:.0f}",
            f"{one['cpu_s']:.2f}",
            f"{one['first_loss']:.5f}",
            idle,
            f"{one['student_mib']:.0f}",
            f"{one['together_mib']:.0f}",
        )
    return table


def ratios_table(figures: dict[str, dict[str, Any]]) -> Table:
    table = Table("ratio", "taid-ray, teacher pool", LOCAL, "target")
    pool, local = (ratios(figures[name], figures) for name in (POOL, LOCAL))
    for name in pool:
        table.add_row(name, f"{pool[name]:.2f}", f"{local[name]:.2f}", TARGETS[name])
    return table


if __name__ == "__main__":
    main()
