"""Names of the files in the directories of runs and searches, for everything that writes or reads them."""

from typing import Literal

LIVE_FILE, ENDED_FILE = "live.json", "ended.json"

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "config.yaml", "metrics.jsonl", "summary.json"
VALIDATION_FILE, REPORT_FILE = "validation.jsonl", "report.html"

RUN_FILE, LOCK_FILE = "run.json", ".lock"

RAY_TRAIN_PREFIX = ".ray-train-"
"""Beginning of the names of directories for Ray Train's own files, which a run removes at its end."""

SEARCH_FILE, TRIALS_FILE, TRIALS = "search.yaml", "trials.json", "trials"

TrialStatus = Literal["waiting", "running", "finished", "stopped", "failed"]
"""Status of a trial in trials.json; `stopped` by the search's scheduler."""
