"""Directories of runs that nobody ran, with everything that a report shows."""

import json
from pathlib import Path
from typing import Any

import yaml

from taid_ray.config.schema import build_config
from taid_ray.run.metrics import OF_TEACHER
from taid_ray.scheduler.schedule import TAIDSchedule

STEPS = 40
TREE: dict[str, Any] = {
    "name": "stories",
    "teacher": {"model": "org/teacher"},
    "student": {"init": "cut", "layers": [0, 4]},
    "data": {"train": "org/data"},
    "schedule": {"t_start": 0.4, "alpha": 0.1},
    "train": {"steps": STEPS, "eval_every": 10},
}
SUMMARY = {
    "steps": STEPS,
    "t": 0.9952,
    "tokens": 4000,
    "teacher": {"cross_entropy": 1.6, "parameters": 262_080},
    "before": {"cross_entropy": 6.5523, "kl": 4.9, "parameters": 136_512},
    "after": {"cross_entropy": 2.25, "kl": 0.71234, "parameters": 136_512},
    "wall_s": 125.0,
    "documents_read": 1024,
    "dropped_documents": 3,
}
BEGAN = [{"began": f"2026-11-21T18:{minute}:21+00:00", "workers": 2, "host": "a<b"} for minute in (19, 25)]


def metric_lines(tree: dict[str, Any], steps: int, total: int) -> list[dict[str, Any]]:
    """As a run of this schedule writes them: t and floor_active are those that the step before led to."""
    schedule = build_config(tree).schedule
    rule = TAIDSchedule(schedule, total)
    lines = []
    for step in range(1, steps + 1):
        state, kl = rule.state, 1 + 1 / step
        lines.append(
            {
                "step": step, "epoch": 0, "t": state.t, "momentum": state.momentum, "loss": kl + 1.5, "kl": kl,
                "entropy_pt": 1.5, "sft": 0.0, "floor_active": state.floor_active, "lr": 1e-3, "grad_norm": 3 / step,
                "tokens": 100, "tokens_per_s": 50.0, "step_s": 2.0, "teacher_wait_s": 0.2, "data_s": 0.1, "forward_s": 0.4,
                "loss_s": 0.3, "backward_s": 0.8, "optimizer_s": 0.1, "schedule_wait_s": 0.0, "teacher_compute_s": 1.8,
                "payload_bytes": 6400, "samples_seen": step * 4,
            }
        )  # fmt: skip
        rule.update(kl + 1.5)
    return lines


def without_teacher(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics or validations as a run with the loss sft and no teacher writes it."""
    return {key: value for key, value in line.items() if key not in (*OF_TEACHER, "teacher_cross_entropy")}


def write_run_without_teacher(run: Path, steps: int = STEPS) -> Path:
    write_run(run, steps, teacher=None, student={"model": "org/student"}, loss={"name": "sft"})
    write_lines(run / "metrics.jsonl", [without_teacher(line) for line in metric_lines(TREE, steps, STEPS)])
    write_lines(run / "validation.jsonl", [without_teacher(line) for line in validation_lines(steps)])
    summary = {key: value for key, value in SUMMARY.items() if key not in ("teacher", "t")}
    for key in ("before", "after"):
        summary[key] = without_teacher(summary[key])
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def validation_lines(steps: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "cross_entropy": 3.5 - step / 40, "teacher_cross_entropy": 1.5, "kl": 2 - step / 40, "tokens": 9}
        for step in range(0, steps + 1, 10)
    ]


def with_sources(run: Path) -> Path:
    """Makes the run at this place one on a mixture: 75 tokens of each step are of `wiki`, and 25 of every second of `code`."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        compared = {"kl": line["kl"]} if "kl" in line else {}
        line["sources"] = {"wiki": compared | {"loss": line["loss"], "sft": 0.0, "tokens": 75}}
        if line["step"] % 2:
            compared = {key: kl / 2 for key, kl in compared.items()}
            line["sources"]["code"] = compared | {"loss": line["loss"] + 1, "sft": 0.0, "tokens": 25}
    write_lines(run / "metrics.jsonl", lines)
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    for line in lines:
        own = {key: line[key] for key in ("cross_entropy", "teacher_cross_entropy", "kl", "tokens") if key in line}
        line["sources"] = {"wiki": own, "code": own | {"cross_entropy": own["cross_entropy"] + 0.5}}
    write_lines(run / "validation.jsonl", lines)
    return run


def write_run(run: Path, steps: int = STEPS, finished: bool = True, **changes: Any) -> Path:
    """changes: of the configuration."""
    run.mkdir(parents=True)
    tree = TREE | changes
    (run / "config.yaml").write_text(yaml.safe_dump(build_config(tree).model_dump(mode="json")))
    (run / "run.json").write_text(json.dumps({"id": "stories-1234", "attempts": BEGAN}))
    total = tree["train"].get("steps") or STEPS
    write_lines(run / "metrics.jsonl", metric_lines(tree, steps, total))
    write_lines(run / "validation.jsonl", validation_lines(steps))
    if finished:
        (run / "summary.json").write_text(json.dumps(SUMMARY | {"steps": steps}))
    return run


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
