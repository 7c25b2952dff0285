"""Status of a run or search, from the files in its directory: on any machine that sees them, and without Ray."""

import json
import re
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_ray.config.schema import DistillConfig, stored_config
from taid_ray.config.text import read_tree
from taid_ray.control.state import Seen, State, state_of
from taid_ray.errors import ConfigError
from taid_ray.files import read_json, read_lines
from taid_ray.report.search_results import Search, read_search
from taid_ray.run.directory import is_locked, read_manifest
from taid_ray.run.layout import (
    CONFIG_FILE,
    ENDED_FILE,
    METRICS_FILE,
    RUN_FILE,
    SEARCH_FILE,
    SUMMARY_FILE,
    VALIDATION_FILE,
)
from taid_ray.run.live import Live, death, read_live, stopped_early

RECENT_STEPS = 20
"""Steps over which speed is measured."""
ASK_S = 3.0
"""Time that the dashboard has for its answer."""
STEP_NAME = re.compile(r"step-(\d+)-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint that is whole."""

    step: int
    age_s: float
    """Time since its last file was written, in seconds."""


@dataclass(frozen=True)
class Status:
    """State and progress of a run or search. Times in seconds, ages as of now; figures are None before the first step."""

    path: str
    state: State
    why: str | None
    """Cause of `failed` and `dead`, and of a trial that its search stopped early."""
    driver: Live | None
    """Content of live.json; None if there is none."""
    ended_age_s: float | None
    """Time since it stopped or failed."""
    name: str
    id: str | None = None
    step: int = 0
    total_steps: int | None = None
    step_age_s: float | None = None
    """Time since the last step; grows when the run hangs."""
    t: float | None = None
    loss: float | None = None
    kl: float | None = None
    step_s: float | None = None
    """Mean over the last steps, as the two following figures."""
    tokens_per_s: float | None = None
    teacher_wait_share: float | None = None
    """None, as t and kl, with the loss `sft`, which asks no teacher."""
    left_s: float | None = None
    """Time that the remaining steps will take, without validations and restarts."""
    validation: dict[str, Any] | None = None
    """Last validation: step, cross_entropy and, with a teacher, kl."""
    checkpoints: str | None = None
    """Directory or URI of the checkpoints."""
    checkpoint: Checkpoint | None = None
    """Newest whole checkpoint; None if there is none, or if they are in object storage, where nobody looked."""
    attempts: int = 0
    """Number of starts of the workers."""
    attempt: dict[str, Any] | None = None
    """Last start: began, workers, host."""
    trials: dict[str, int] | None = None
    """Number of a search's trials by status, and `all` that it will have."""
    best: dict[str, Any] | None = None
    """Name, value and params of a search's best finished trial."""

    @property
    def headline(self) -> str:
        """The state in one line, and what it means for the user."""
        place = "" if self.trials is not None else f" after step {self.step} of {self.total_steps or '?'}"
        words = {
            "finished": f"finished{place}",
            "finishing": "finishing: its trials are over, its report is being written",
            "stopped": f"stopped{place}" + (f": {self.why}" if self.why else "; the same command goes on with it"),
            "failed": f"failed{place}: {self.why}",
            "dead": f"dead{place}: {self.why}; the same command goes on with it",
        }
        return words.get(self.state, self.state)


def read_status(path: Path) -> Status:
    """Reads the directory of a run or search.

    Raises ConfigError if it is neither, RunError if a file in it is damaged.
    """
    if (path / SEARCH_FILE).is_file():
        return _search_status(path, read_search(path, last_lines=True))
    run = read_manifest(path / RUN_FILE)
    if run is None or not (path / CONFIG_FILE).is_file():
        what = "it holds no run and no search" if path.is_dir() else "there is no such directory"
        raise ConfigError(
            f"{path}: {what}; name what `taid-ray train`, `tune` or `submit` was given as --out (a run that ends before its "
            "first step removes its directory)"
        )
    return _run_status(path, stored_config(read_tree(path / CONFIG_FILE)), run)


def _search_status(path: Path, search: Search) -> Status:
    live, ended = read_live(path), read_json(path / ENDED_FILE)
    over = sum(trial.status in ("finished", "stopped", "failed") for trial in search.trials)
    state, why = state_of(
        Seen(
            search=True,
            complete=over >= search.space.num_trials,
            live=live is not None,
            begun=live is not None and live.address is not None,
            death=death(path, live) if live else None,
            ended=ended,
            locked=is_locked(path),
        )
    )
    best = search.best()
    return Status(
        path=str(path),
        state=state,
        why=why,
        driver=live,
        ended_age_s=_age(ended),
        name=search.name,
        trials=dict(Counter(trial.status for trial in search.trials)) | {"all": search.space.num_trials},
        best={"name": best.name, search.metric: best.figure(search.metric), "params": best.params} if best else None,
    )


def _run_status(path: Path, config: DistillConfig, run: dict[str, Any]) -> Status:
    live, ended, summary = read_live(path), read_json(path / ENDED_FILE), read_json(path / SUMMARY_FILE)
    lines = read_lines(path / METRICS_FILE, RECENT_STEPS)
    written = (path / METRICS_FILE).stat().st_mtime if lines else 0.0
    given_up = not summary and stopped_early(path)
    state, why = state_of(
        Seen(
            complete=summary is not None,
            given_up=given_up,
            live=live is not None,
            begun=live is not None and written > live.began,
            death=death(path, live) if live else None,
            ended=ended,
            locked=is_locked(path),
        )
    )
    storage = config.checkpoint.storage
    return Status(
        path=str(path),
        state=state,
        why=why,
        driver=None if given_up else live,
        ended_age_s=None if summary else _age(ended),
        name=config.name,
        id=run["id"],
        **_progress(lines, written, _total_steps(config, live, ended, summary)),
        validation=_last_validation(path),
        checkpoints=f"{storage.rstrip('/')}/{run['id']}" if storage else str(path / "checkpoints"),
        checkpoint=_newest_checkpoint(Path(storage) / run["id"] if storage else path / "checkpoints"),
        attempts=len(run["attempts"]),
        attempt=run["attempts"][-1] if run["attempts"] else None,
    )


def _total_steps(
    config: DistillConfig, live: Live | None, ended: dict[str, Any] | None, summary: dict[str, Any] | None
) -> int | None:
    """Steps of the whole run, from the first that knows them: with train.epochs the configuration does not."""
    known = ((summary or {}).get("steps"), live and live.total_steps, (ended or {}).get("total_steps"))
    return next((steps for steps in known if steps), config.train.steps)


def _progress(lines: list[dict[str, Any]], written: float, total: int | None) -> dict[str, Any]:
    """The fields of Status that follow from the last lines of metrics.jsonl and when it was written."""
    if not lines:
        return {"total_steps": total}
    seconds, last = max(1e-9, sum(line["step_s"] for line in lines)), lines[-1]
    step_s = seconds / len(lines)
    waited = [line["teacher_wait_s"] for line in lines if "teacher_wait_s" in line]
    return {
        **_picked(last, ("step", "t", "loss", "kl")),
        "total_steps": total,
        "step_age_s": time.time() - written,
        "step_s": step_s,
        "tokens_per_s": sum(line["tokens"] for line in lines) / seconds,
        "teacher_wait_share": sum(waited) / seconds if waited else None,
        "left_s": (total - last["step"]) * step_s if total else None,
    }


def _last_validation(path: Path) -> dict[str, Any] | None:
    lines = read_lines(path / VALIDATION_FILE, 1)
    return _picked(lines[-1], ("step", "kl", "cross_entropy")) if lines else None


def _picked(line: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: line[key] for key in keys if key in line}


def _age(ended: dict[str, Any] | None) -> float | None:
    return None if ended is None else time.time() - ended["ended"]


def _newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose last file every rank has written.

    checkpoint.store.CheckpointStore finds it in the same way, but takes 5 s to import.
    """
    for path in sorted(directory.glob("step-*"), reverse=True):
        name = STEP_NAME.fullmatch(path.name)
        with suppress(OSError, ValueError, KeyError):  # torn, or just being deleted
            ranks = json.loads((path / "rank-00000.json").read_text(encoding="utf-8"))["world_size"]
            written = max((path / f"rank-{rank:05d}.json").stat().st_mtime for rank in range(ranks))
            if name:
                return Checkpoint(int(name[1]), time.time() - written)
    return None


def replica_states(live: Live) -> dict[str, int] | None:
    """Number of replicas of the run's teacher pool by state; None if the cluster's dashboard does not answer."""
    if live.dashboard is None or live.pool is None:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        with urllib.request.urlopen(f"{live.dashboard}/api/serve/applications/", timeout=ASK_S) as answer:
            deployments = json.load(answer)["applications"][live.pool]["deployments"]
        replicas = (replica for deployment in deployments.values() for replica in deployment["replicas"])
        return dict(Counter(str(replica["state"]).lower() for replica in replicas))
    return None
