"""The files of a search that nobody ran: what reading, ranking, notes and reports are tested with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from taid_ray.config.schema import build_config

STEPS = 40
BASE: dict[str, Any] = {
    "name": "stories",
    "teacher": {"model": "org/teacher"},
    "student": {"init": "cut", "layers": [0, 4]},
    "data": {"train": "org/data"},
    "train": {"steps": STEPS, "eval_every": 10},
}
ALPHA = {"schedule.alpha_steps": {"loguniform": [1, 20]}}


@dataclass
class Written:
    """One trial. Its run directory exists unless it waits."""

    figure: float = 1.0
    """KL of the last validation; cross-entropy is 1.5 more."""
    params: dict[str, Any] = field(default_factory=dict)
    status: str = "finished"
    step: int = STEPS
    error: str | None = None
    schedule: dict[str, Any] = field(default_factory=dict)


def write_search(directory: Path, trials: list[Written], space: Mapping[str, Any] = ALPHA, **settings: Any) -> Path:
    """settings: further keys of the space file."""
    base = build_config(BASE).model_dump(mode="json") | {"out": str(directory)}
    directory.mkdir(parents=True, exist_ok=True)
    content = {"id": "stories-1234", "config": base, "space": {"space": dict(space)} | settings}
    (directory / "search.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    entries = [
        {"name": f"{number:04d}", "params": trial.params, "status": trial.status, "error": trial.error}
        for number, trial in enumerate(trials, start=1)
    ]
    (directory / "trials.json").write_text(json.dumps(entries))
    for entry, trial in zip(entries, trials, strict=True):
        if trial.status != "waiting":
            write_trial(directory / "trials" / entry["name"], trial)
    return directory


def write_trial(run: Path, trial: Written) -> None:
    run.mkdir(parents=True)
    tree = BASE | {"out": str(run), "name": f"stories-{run.name}", "schedule": trial.schedule}
    (run / "config.yaml").write_text(yaml.safe_dump(build_config(tree).model_dump(mode="json")))
    metrics = [
        {"step": step, "t": 0.4 + step / 100, "loss": 2 + 1 / step, "step_s": 0.1} for step in range(1, trial.step + 1)
    ]
    write_lines(run / "metrics.jsonl", metrics)
    validations = []
    for step in range(0, trial.step + 1, 10):
        kl = trial.figure + (trial.step - trial.step % 10 - step) / 10
        figures = {"cross_entropy": kl + 1.5, "teacher_cross_entropy": 1.5, "kl": kl, "tokens": 100}
        validations.append({"step": step} | figures)
    write_lines(run / "validation.jsonl", validations)
    if trial.status == "finished":
        (run / "summary.json").write_text(json.dumps({"steps": trial.step, "teacher_tokens": 1000}))


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
