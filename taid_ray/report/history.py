"""History of a run, read from its directory: the figures of all steps as columns, validations, attempts, how far it came.

Reads finished, unfinished and running runs alike, and changes nothing in them.
"""

import json
from array import array
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from taid_ray.config.schema import DistillConfig, stored_config
from taid_ray.config.text import read_tree
from taid_ray.errors import ConfigError
from taid_ray.files import damaged, read_json, read_lines
from taid_ray.run.directory import read_manifest
from taid_ray.run.layout import CONFIG_FILE, METRICS_FILE, RUN_FILE, SEARCH_FILE, SUMMARY_FILE, VALIDATION_FILE
from taid_ray.run.metrics import OF_TEACHER, PHASES

PHASE_COLUMNS = tuple(f"{phase}_s" for phase in PHASES)
COLUMNS = (
    "step", "epoch", "t", "momentum", "loss", "kl", "entropy_pt", "sft", "floor_active", "lr", "grad_norm", "tokens", "step_s",
    *PHASE_COLUMNS, "teacher_compute_s", "payload_bytes", "samples_seen",
)  # fmt: skip
SOURCE_COLUMNS = ("loss", "kl", "tokens")


@dataclass(frozen=True)
class History:
    """Everything a report needs to know of a run that has made at least one step."""

    path: Path
    config: DistillConfig
    id: str
    attempts: list[dict[str, Any]]
    """Starts of workers: `began` (UTC, ISO 8601), `workers`, `host` of each."""
    columns: dict[str, np.ndarray]
    """Columns of metrics.jsonl by the names in COLUMNS, float64 [steps]; see `run.metrics.StepMetrics`. With the loss `sft`
    those of OF_TEACHER are not there."""
    sources: dict[str, dict[str, np.ndarray]]
    """Figures of each source of training data, if there are several: `loss`, `kl` and `tokens`, float64 [steps], 0 in steps
    without a loss position of the source."""
    validations: list[dict[str, Any]]
    """Lines of validation.jsonl."""
    summary: dict[str, Any] | None
    """Content of summary.json; None until the run has finished."""
    written: datetime
    """Time at which the last step was written."""

    @property
    def phases(self) -> list[str]:
        """Names of the columns that the time of a step is made of."""
        return [name for name in PHASE_COLUMNS if name in self.columns]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    @property
    def steps(self) -> int:
        """Number of optimizer steps made."""
        return len(self["step"])

    @property
    def total_steps(self) -> int | None:
        """Number of steps of the whole run; None if that follows from train.epochs and the run has not ended."""
        return int(self.summary["steps"]) if self.summary is not None else self.config.train.steps

    def floor(self) -> np.ndarray | None:
        """The linear floor under the t of each step, capped as t is, float64 [steps]; None without `total_steps`."""
        schedule, total = self.config.schedule, self.total_steps
        if total is None:
            return None
        # The t of a step follows from the loss of the step before, and the first loss only starts the comparison.
        share = np.maximum(self["step"] - 2, 0) / total
        return np.minimum(schedule.t_end, schedule.t_start + (schedule.t_end - schedule.t_start) * share)


def read_history(path: Path) -> History:
    """Reads a run directory.

    Raises ConfigError if it is none or no step was made yet, RunError if a file is damaged.
    """
    _check_is_run(path)
    run, summary = read_manifest(path / RUN_FILE), read_json(path / SUMMARY_FILE)
    metrics = path / METRICS_FILE
    config = stored_config(read_tree(path / CONFIG_FILE))
    left_out = () if config.learns_from_teacher else OF_TEACHER
    columns, sources = _read_columns(metrics, left_out) if metrics.exists() else ({}, {})
    if run is None or not columns:
        raise ConfigError(
            f"the run in {path} has made no step yet, so there is nothing to report; try again after the first step"
        )
    written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC)
    validations = read_lines(path / VALIDATION_FILE)
    return History(
        path,
        config,
        run["id"],
        run["attempts"],
        columns,
        sources,
        validations,
        summary,
        written,
    )


def _check_is_run(path: Path) -> None:
    if (path / SEARCH_FILE).is_file():
        raise ConfigError(
            f"{path} is the directory of a search, which has a report.html of its own; name one of its trials, "
            f"{path}/trials/NAME"
        )
    for name in (CONFIG_FILE, RUN_FILE):
        if not (path / name).is_file():
            what = f"it holds no {name}" if path.is_dir() else "there is no such directory"
            raise ConfigError(f"{path} is not a run directory: {what}; name what `taid-ray train` was given as --out")


def _read_columns(
    path: Path, left_out: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Reads metrics.jsonl into arrays, in which a million steps take little memory. Empty before the first step.

    Returns the columns of all steps, and those of each source. left_out: columns that are not there.
    """
    wanted, of_source = ([name for name in names if name not in left_out] for names in (COLUMNS, SOURCE_COLUMNS))
    pick, pick_of_source, values = itemgetter(*wanted), itemgetter(*of_source), array("d")
    by_source: dict[str, array[float]] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):  # it is being written, or was by a process that died
                break
            try:
                read = json.loads(line)
                found = pick(read)
                if found[0] != number:
                    raise ValueError(f"it is of step {found[0]}")
                values.extend(found)
                for name, figures in read.get("sources", {}).items():
                    by_source.setdefault(name, array("d")).extend((number - 1, *pick_of_source(figures)))
            except KeyError as error:
                raise damaged(path, f"line {number} has no {error}; was it written by another version?") from None
            except (ValueError, TypeError) as error:
                raise damaged(path, f"line {number} is not that of step {number} ({error})") from None
    table = np.frombuffer(values, dtype=np.float64).reshape(-1, len(wanted))
    if not len(table):
        return {}, {}
    columns = {name: table[:, place] for place, name in enumerate(wanted)}
    return columns, {name: _source_columns(found, of_source, len(table)) for name, found in by_source.items()}


def _source_columns(values: "array[float]", names: list[str], steps: int) -> dict[str, np.ndarray]:
    """Spreads the figures of a source over all steps. values: the place of a step, then `names`, again and again."""
    found = np.frombuffer(values, dtype=np.float64).reshape(-1, 1 + len(names))
    table = np.zeros((len(names), steps))
    table[:, found[:, 0].astype(int)] = found[:, 1:].T
    return dict(zip(names, table, strict=True))
