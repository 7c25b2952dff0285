"""The capacity gap: three teachers of growing size, made here by SFT on TinyStories, and one student under each of them.

    python -m benchmarks.compare_gap           # `make compare-gap`
    python -m benchmarks.compare_gap --short   # the same path with few steps, methods and seeds

Real: everything. What is trained stays in --out, so that the same command goes on after an interruption.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, local_ray, write
from benchmarks.compare import CONCURRENT, CPUS, OBJECT_STORE_MIB, train_section
from benchmarks.pairs import trained_by_sft
from taid_ray.cli.quickstart import BUNDLE
from taid_ray.compare import tables
from taid_ray.compare.gap import Gap, notes, run_gap, table
from taid_ray.compare.gap_page import as_json, write_gap_report
from taid_ray.config.schema import build_config

METHODS = ["forward_kl", "skew_forward_kl", "taid_linear", "taid"]
SIXTEEN_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}
TEACHERS = {  # name, fields of the Llama's config, steps
    "60k": ({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}, 600),
    "250k": ({"hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 5}, 600),
    "1m": ({"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5} | SIXTEEN_HEADS, 600),
}
STUDENT = {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
STUDENT |= {"num_key_value_heads": 2, "head_dim": 6}
DATA = {
    "train": str(BUNDLE / "tinystories_train.jsonl"),
    "valid": str(BUNDLE / "tinystories_valid.jsonl"),
    "sequence_length": 256,
}


def main() -> None:
    """Trains the teachers and the student's first weights, runs the comparisons, and writes results/compare_gap.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-compare-gap")
    options = parser.parse_args()
    short, out = options.short, options.out / "short" if options.short else options.out
    start = time.perf_counter()
    with local_ray(CPUS, OBJECT_STORE_MIB):
        gap = compared(out, short)
    write_gap_report(gap)
    command = f"python -m benchmarks.compare_gap{' --short' if short else ''}"
    result: dict[str, Any] = {"command": command, "seconds": time.perf_counter() - start, **as_json(gap)}
    write(
        "compare_gap_short" if short else "compare_gap",
        result,
        [tables.shown("Cross-entropy of the students by teacher (parameters)", table(gap))],
    )
    for note in notes(gap):
        print(note)


def compared(out: Path, short: bool) -> Gap:
    """Three teachers, or the two smaller ones for few steps, and the students of each."""
    teachers = [
        trained_by_sft(out / "teachers" / name, architecture, DATA, 20 if short else steps)
        for name, (architecture, steps) in list(TEACHERS.items())[: 2 if short else None]
    ]
    named = [link(model, out / "models" / model.parent.name) for model in teachers]
    config = build_config(
        {
            "name": "gap",
            "device": "cpu",
            "teacher": {"model": named[0], "dtype": "float32", "cpus_per_shard": 0.5},
            "student": {
                "model": str(BUNDLE / "stories260k"),
                "init": "scratch",
                "architecture": STUDENT,
                "dtype": "float32",
                "cpus_per_worker": 0.75,
            },
            "data": DATA | {"valid_documents": 20 if short else 198},
            "schedule": {"t_start": 0.2, "alpha": 0.02},
            "train": train_section(short, steps=400, learning_rate=4e-3, eval_every=100),
        }
    )
    methods = METHODS[::3] if short else METHODS
    return run_gap(config, methods, named, 2 if short else 3, out / "comparison", CONCURRENT)


def link(model: Path, name: Path) -> str:
    """A name of its own for a model directory, which is called `model` like all others."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if not name.exists():
        name.symlink_to(model, target_is_directory=True)
    return str(name)


if __name__ == "__main__":
    main()
