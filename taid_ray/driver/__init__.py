"""The driver, the one process that holds references: preflight, launch, attempts, teacher pool, progress, liveness.

A run, top to bottom: `launch.distill` -> `preflight.prepare` (gives the `RunSpec`) -> `launch.run_on_cluster` ->
`student.worker.run_worker` in each Ray Train process -> `student.loop.train_loop`. The driver never holds tensors; they go
from pool to worker. Others use `launch` (distill, run_distillation), `preflight`, `pool.PoolKeeper`, `progress`,
`signals`, `cache_fill` and `cache_export`.

Traps:
- Restarts are ours, not Ray Train's (`attempts` says why): each attempt is one `fit` without retries. An AttemptError is
  tried again, every other TaidRayError ends the run.
- `pool` tells a restarted scheduler actor again that the pool is up.
- A run's figures reach the driver by RUN/metrics.jsonl and validation.jsonl only (`progress_relay`, trackers). What it decides
  at a signal, it knows from the scheduler actor: a shared file system may show a new line seconds late.
- After SIGKILL of a driver with a local Ray, two of Ray's own agents live on for about a minute, then end.
"""
