"""The one process that holds references: preflight, launch, attempts, supervision, progress, liveness.

A run, top to bottom: `launch.distill` -> `preflight.prepare` (gives the `RunSpec`) -> `launch.run_on_cluster` ->
`student.worker.run_worker` in each Ray Train process -> `student.loop.train_loop`. The driver never holds tensors; they go
from pool to worker. Others use `launch` (distill, run_distillation), `preflight`, `supervise.teacher_pool`, `progress`,
`signals` and `cache_fill`.

Traps:
- Restarts are ours, not Ray Train's (`attempts` says why): each attempt is one `fit` without retries. An AttemptError is
  tried again, every other TaidRayError ends the run.
- `supervise` tells a restarted scheduler actor again that the pool is up.
- After SIGKILL of a driver with a local Ray, two of Ray's own agents live on for about a minute, then end.
"""
