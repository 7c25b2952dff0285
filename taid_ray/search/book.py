"""The book of a search's trials, kept in its directory: it outlives the driver, and Ray Tune's own files are never read."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taid_ray.files import damaged, read_json, write_json
from taid_ray.run.layout import SUMMARY_FILE, TRIALS, TRIALS_FILE, TrialStatus


class TrialBook:
    """DIR/trials.json, written by the search's driver only, after every change."""

    def __init__(self, directory: Path):
        """Reads what an earlier driver left; trials that ran then wait now. Raises RunError if it cannot be read."""
        self._directory, self._path = directory, directory / TRIALS_FILE
        self.entries: list[dict[str, Any]] = []
        """Trials in the order of their creation: `name`, `params`, `status` and `error` of each."""
        self._named: Counter[str] = Counter()
        if self._path.exists():
            self.entries = read_json(self._path)
            try:
                for entry in self.entries:
                    entry["status"] = self._status_left(entry)
            except (TypeError, KeyError) as error:
                raise damaged(self._path, f"it holds no list of trials ({error})") from None
            self._write()

    def assign_name(self, params: Mapping[str, Any]) -> str:
        """Returns the name of a trial, which must be asked for once per trial and driver.

        Params that an earlier driver has tried get the name of then, the n-th time that of the n-th such trial; all others
        get a new name.
        """
        params = {key: value.item() if isinstance(value, np.generic) else value for key, value in params.items()}
        key = json.dumps(params, sort_keys=True)
        same = [entry for entry in self.entries if json.dumps(entry["params"], sort_keys=True) == key]
        self._named[key] += 1
        if self._named[key] <= len(same):
            return str(same[self._named[key] - 1]["name"])
        name = f"{len(self.entries) + 1:04d}"
        self.entries.append({"name": name, "params": params, "status": "waiting", "error": ""})
        self._write()
        return name

    def mark(self, name: str, status: TrialStatus, error: str = "") -> None:
        """Records a trial's status."""
        entry = next(entry for entry in self.entries if entry["name"] == name)
        entry["status"], entry["error"] = status, error
        self._write()

    def params(self) -> list[dict[str, Any]]:
        """The params of every trial, in the order of their creation."""
        return [entry["params"] for entry in self.entries]

    def with_status(self, *wanted: TrialStatus) -> list[str]:
        """The names of the trials with one of these statuses."""
        return [entry["name"] for entry in self.entries if entry["status"] in wanted]

    def run_dir(self, name: str) -> Path:
        """The run directory of a trial."""
        return self._directory / TRIALS / name

    def is_finished(self, name: str) -> bool:
        """True if the trial's run directory is complete."""
        return (self.run_dir(name) / SUMMARY_FILE).exists()

    def _status_left(self, entry: Mapping[str, Any]) -> TrialStatus:
        if self.is_finished(entry["name"]):
            return "finished"
        # A failed trial goes on from its last checkpoint: the cause may have been put right.
        return "stopped" if entry["status"] == "stopped" else "waiting"

    def _write(self) -> None:
        write_json(self._path, self.entries)
