"""Methods against each other: TinyStories with the bundled teacher, and Dolly with a pair that is trained here first.

    python -m benchmarks.compare           # `make compare`: 12 methods x 3 seeds, and 4 methods x 3 seeds
    python -m benchmarks.compare --short   # the same path with few steps, methods and seeds

Real: everything. Dolly's files are looked for in --data, by default where developers have them; without them that half is left
out, and said. What is trained stays in --out, so that the same command goes on after an interruption.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.common import ROOT, local_ray, write
from benchmarks.pairs import trained_by_sft
from taid_ray.cli.quickstart import quickstart_config
from taid_ray.compare import tables
from taid_ray.compare.driver import run_compare
from taid_ray.compare.page import as_json
from taid_ray.compare.results import Comparison
from taid_ray.config.schema import DistillConfig, build_config

METHODS = ["sft", "forward_kl", "reverse_kl", "js", "tvd", "skew_forward_kl"]
METHODS += ["adaptive_kl", "dkd", "ctkd", "gkd_offline", "taid_linear", "taid"]
DOLLY_METHODS = ["sft", "forward_kl", "skew_forward_kl", "taid"]
CPUS, OBJECT_STORE_MIB, CONCURRENT = 3, 1024, 2
"""Of the local Ray, whatever cores there are; and runs at a time."""
DOLLY = ROOT.parent / "shared" / "data" / "instruct"
DOLLY_TEACHER = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5}
DOLLY_STUDENT = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2}


def main() -> None:
    """Runs both comparisons and writes results/compare.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--data", type=Path, default=DOLLY)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-compare")
    options = parser.parse_args()
    short, out = options.short, options.out / "short" if options.short else options.out
    if not (options.data / "dolly_dev1000.jsonl").exists():
        print(f"Dolly is left out: {options.data} has no dolly_dev1000.jsonl; name its directory with --data")
        options.data = None
    with local_ray(CPUS, OBJECT_STORE_MIB):
        result, shown = both(options.data, out, short)
    command = f"python -m benchmarks.compare{' --short' if short else ''}"
    write("compare_short" if short else "compare", {"command": command, **result}, shown)


def both(data: Path | None, out: Path, short: bool) -> tuple[dict[str, Any], list[Table]]:
    """The figures of both comparisons by name, and their tables."""
    methods, seeds = ["sft", "forward_kl", "taid"] if short else METHODS, 2 if short else 3
    stories, shown = compared("tinystories", stories_config(short), methods, seeds, out)
    if data is None:
        return {"tinystories": stories}, shown
    methods = DOLLY_METHODS[: 2 if short else None]
    dolly, more = compared("dolly", dolly_config(data, out, short), methods, seeds, out)
    return {"tinystories": stories, "dolly": dolly}, [*shown, *more]


def compared(
    name: str, config: DistillConfig, methods: list[str], seeds: int, out: Path
) -> tuple[dict[str, Any], list[Table]]:
    """The figures of one comparison, with the seconds that this call took, and its tables."""
    start = time.perf_counter()
    found = run_compare(config, methods, seeds, out / name, CONCURRENT).comparison
    assert len(found.evaluations) == len(methods) * seeds, [trial.error for trial in found.trials.values()]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "training_s": training_s(found), **as_json(found)}, [
        tables.shown(f"{name}: quality", tables.quality(found)),
        tables.shown(f"{name}: mass of head and tail", tables.shape(found)),
        tables.shown(f"{name}: cost", tables.cost(found)),
        tables.shown(f"{name}: cross-entropy, row better (+) or worse (-)", tables.matrix(found, found.judged[0])),
    ]


def training_s(found: Comparison) -> float:
    """Seconds of all optimizer steps, without the starts of workers."""
    return sum(line["step_s"] for trial in found.trials.values() for line in trial.metrics)


def stories_config(short: bool) -> DistillConfig:
    """The quickstart's pair and stories."""
    keys = ["device=cpu", "train.eval_every=50", "teacher.cpus_per_shard=0.5", "student.cpus_per_worker=0.75"]
    if short:
        keys += ["train.steps=20", "train.eval_every=10", "data.valid_documents=20"]
    return quickstart_config(keys, None)


def dolly_config(data: Path, out: Path, short: bool) -> DistillConfig:
    """A pair of small Llamas that this project's own SFT has trained on Dolly, the teacher longer than the student."""
    dolly = {
        "train": str(data / "dolly_train_clean.jsonl"),
        "valid": str(data / "dolly_dev1000.jsonl"),
        "valid_documents": 20 if short else 200,
        "format": "prompt_response",
        "prompt_columns": ["instruction", "input"],
        "response_column": "output",
        "sequence_length": 512,
        "overlong": "drop",
    }
    teacher = trained_by_sft(out / "dolly-teacher", DOLLY_TEACHER, dolly, 20 if short else 250)
    student = trained_by_sft(out / "dolly-student", DOLLY_STUDENT, dolly, 10 if short else 150)
    return build_config(
        {
            "name": "dolly",
            "device": "cpu",
            "teacher": {"model": str(teacher), "dtype": "float32", "cpus_per_shard": 0.5},
            "student": {"model": str(student), "dtype": "float32", "cpus_per_worker": 0.75},
            "data": dolly,
            "schedule": {"t_start": 0.2, "alpha": 0.02},
            "train": train_section(short, steps=300, learning_rate=1e-3, eval_every=50),
        }
    )


def train_section(short: bool, steps: int, learning_rate: float, eval_every: int) -> dict[str, Any]:
    """The section `train` of a comparison's configuration. short: of a few steps only, to try it."""
    return {
        "steps": 20 if short else steps,
        "batch_size": 16,
        "micro_batch_size": 16,
        "learning_rate": learning_rate,
        "warmup_steps": 10,
        "eval_every": 10 if short else eval_every,
    }


if __name__ == "__main__":
    main()
