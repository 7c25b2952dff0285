"""A run's directory: names of its files, lock and manifest, liveness, log, metrics. Loads no torch.

Others use `layout` (names of files), `directory` (run_directory, RunManifest, locked), `live` (Live, read_live), `log`
(run_logging), `metrics` (StepMetrics, metrics_log) and `bottleneck` (what holds a run back).

Traps:
- A run directory has one driver (a file lock), and a run one name on its cluster (run.json), so what a dead driver left
  behind is its successor's.
- live.json is there as long as a driver has the directory, ended.json after an end by a signal or an error.
- A run directory on object storage is not supported (checkpoints are).
"""
