"""What a search of eight trials costs in teacher computation and time, against one run alone.

Real: everything, on the quickstart's models and data, on a local Ray. The teacher's outputs are shared through the cache.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.common import local_ray, write
from taid_ray.cli.quickstart import quickstart_config
from taid_ray.config.schema import DistillConfig
from taid_ray.config.space import Space
from taid_ray.driver.launch import distill
from taid_ray.search.driver import run_search

TRIALS, CONCURRENT, STEPS, DOCUMENTS = 8, 2, 60, 300
TARGET_TOKENS = 1.1
SPACE = {
    "search": "random",
    "trials": TRIALS,
    "space": {
        "schedule.alpha_steps": {"loguniform": [1, 20]},
        "schedule.beta": {"uniform": [0.5, 0.99]},
        "schedule.t_start": {"choice": [0.2, 0.4]},
    },
}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="taid-bench-") as scratch, local_ray(1 + CONCURRENT, 512):
        out = Path(scratch)
        lone, lone_s = run(quickstart_config([f"train.steps={STEPS}"], str(out / "lone")))
        start = time.perf_counter()
        found = run_search(
            quickstart_config([f"train.steps={STEPS}"], None), Space.model_validate(SPACE), out / "search", CONCURRENT
        )
        search_s = time.perf_counter() - start
        summaries = [trial.summary for trial in found.search.trials if trial.summary]
        assert len(summaries) == TRIALS, [trial.error for trial in found.search.trials]
        epochs = {number: run(epochs_config(out, number))[0]["teacher_tokens"] for number in (1, 2)}
    trial_tokens = [summary["teacher_tokens"] for summary in summaries]
    result = {
        "trials": TRIALS,
        "concurrent": CONCURRENT,
        "steps": STEPS,
        "lone": {"teacher_tokens": lone["teacher_tokens"], "seconds": lone_s},
        "search": {"teacher_tokens": trial_tokens, "seconds": search_s},
        "epochs": epochs,
        "teacher_tokens_ratio": sum(trial_tokens) / lone["teacher_tokens"],
        "seconds_per_trial_ratio": search_s / TRIALS / lone_s,
        "two_epochs_ratio": epochs[2] / epochs[1],
    }
    write("tune", result, [table(result)])


def run(config: DistillConfig) -> tuple[dict[str, Any], float]:
    """The summary, and the seconds from the call to the finished run directory."""
    start = time.perf_counter()
    return distill(config).summary, time.perf_counter() - start


def epochs_config(out: Path, epochs: int) -> DistillConfig:
    """The first documents only, so many times, with a new cache."""
    config = quickstart_config(["data.pack=true"], None)
    few = out / "few.jsonl"
    few.write_text("".join(Path(str(config.data.train)).read_text().splitlines(keepends=True)[:DOCUMENTS]))
    keys = [
        f"data.train={few}",
        "train.steps=null",
        f"train.epochs={epochs}",
        "train.warmup_steps=0",
        f"cache.directory={out}/cache-{epochs}",
    ]
    return quickstart_config(keys, str(out / f"epochs-{epochs}"))


def table(result: dict[str, Any]) -> Table:
    lone, found = result["lone"], result["search"]
    shown = Table(title=f"Search of {TRIALS} trials of {STEPS} steps, {CONCURRENT} at a time, against one run alone")
    for column in ("", "one run", "search", "ratio"):
        shown.add_column(column, justify="right" if column else "left")
    total = sum(found["teacher_tokens"])
    ratio = result["teacher_tokens_ratio"]
    verdict = "met" if ratio <= TARGET_TOKENS else "missed"
    shown.add_row(
        f"teacher tokens computed, all trials (at most {TARGET_TOKENS}: {verdict})",
        f"{lone['teacher_tokens']:,}",
        f"{total:,}",
        f"{ratio:.2f}",
    )
    per_trial = found["seconds"] / TRIALS
    shown.add_row(
        "wall time per trial, s",
        f"{lone['seconds']:.1f}",
        f"{per_trial:.1f}",
        f"{result['seconds_per_trial_ratio']:.2f}",
    )
    one, two = result["epochs"][1], result["epochs"][2]
    shown.add_row("teacher tokens: one epoch, two epochs", f"{one:,}", f"{two:,}", f"{result['two_epochs_ratio']:.2f}")
    return shown


if __name__ == "__main__":
    main()
