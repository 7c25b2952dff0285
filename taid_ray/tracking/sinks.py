"""Trackers that take a run's figures: TensorBoard always, W&B and MLflow through their own libraries."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from taid_ray.config.paths import flat
from taid_ray.config.schema import DistillConfig

Outcome = Literal["finished", "stopped", "failed"]
TENSORBOARD = "tensorboard"
MLFLOW_TAG = "taid_ray.run"
MOST_MLFLOW = 1000
"""Number of figures that an MLflow server takes at a time."""
LONGEST_PARAM = 500
"""Number of characters of a value that every MLflow server takes."""


class Point(NamedTuple):
    """Figures of one optimizer step."""

    step: int
    figures: dict[str, float]
    """Values by names such as train/loss."""


class Tracker(Protocol):
    """Takes the points of one run, in the order of their steps."""

    rewrites_history: bool
    """Whether it is written anew, from the first step on, whenever the workers go back to a checkpoint."""
    known: int
    """Last step that it holds from an earlier driver; -1 if none."""

    def send(self, points: list[Point]) -> None:
        """Sends points. Raises what the library raises if they do not arrive; may then be called again with the same ones."""

    def close(self, outcome: Outcome) -> None:
        """Ends the run at the tracker."""


def point(line: Mapping[str, Any], section: str) -> Point:
    """The point of a line of metrics.jsonl (section train) or validation.jsonl (validation).

    Durations go into `time`; figures of a source of the data into `section/source NAME`.
    """
    figures: dict[str, float] = {}
    for name, found in line.get("sources", {}).items():
        figures |= {f"{section}/source {name}/{key}": float(value) for key, value in found.items()}
    for key, value in line.items():
        if key not in ("step", "sources"):
            place = "time" if key.endswith("_s") and key != "tokens_per_s" else section
            figures[f"{place}/{key}"] = float(value)
    return Point(int(line["step"]), figures)


class TensorBoard:
    """RUN/tensorboard, written anew by every driver and after every restart, so that it holds what metrics.jsonl holds."""

    rewrites_history, known = True, -1

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        old = list(directory.glob("events.out.tfevents.*"))
        # A viewer that has read the old files already is told to forget them.
        self._writer = SummaryWriter(str(directory), purge_step=0)
        for path in old:
            path.unlink(missing_ok=True)

    def send(self, points: list[Point]) -> None:
        for step, figures in points:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run of the same id, which a resumed run goes on with. Its steps before the resumption stay as they were."""

    rewrites_history = False

    def __init__(self, project: str, run: str, config: DistillConfig, group: str | None):
        # Else W&B asks for a key at the terminal while the cluster waits; silent, it raises an error instead.
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run = wandb.init(
            project=project,
            id=run,
            name=config.name,
            group=group,
            config=config.model_dump(mode="json"),
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(config.run_dir),
            settings=wandb.Settings(console="off"),
        )
        self.known = self._run.step - 1

    @property
    def address(self) -> str:
        """Address of the run's page; empty offline."""
        return "" if self._run.offline else str(self._run.url or "")

    def send(self, points: list[Point]) -> None:
        for step, figures in points:
            self._run.log(figures, step=step)

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=int(outcome == "failed"))


class MLflow:
    """An MLflow run, found again by a tag: MLflow gives ids of its own."""

    rewrites_history = False

    def __init__(self, experiment: str, run: str, config: DistillConfig, group: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        runs = self._client.search_runs([place], f"tags.`{MLFLOW_TAG}` = '{run}'", max_results=1)
        if runs:
            self._id, self.known = runs[0].info.run_id, int(runs[0].data.metrics.get("step", -1))
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {MLFLOW_TAG: run} | ({"taid_ray.search": group} if group else {})
        self._id, self.known = self._client.create_run(place, run_name=config.name, tags=tags).info.run_id, -1
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in flat(config.model_dump(mode="json")).items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[start : start + 100])

    def send(self, points: list[Point]) -> None:
        batch: list[Any] = []
        now = int(time.time() * 1000)
        for step, figures in points:
            found = [self._metric(name, value, now, step) for name, value in (figures | {"step": step}).items()]
            if len(batch) + len(found) > MOST_MLFLOW:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            batch += found
        if batch:
            self._client.log_batch(self._id, metrics=batch)

    def close(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self._client.set_terminated(self._id, status)
