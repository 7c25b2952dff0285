"""Control of live runs from outside: submit, jobs, status, stop, scale.

Others use `submit`, `jobs`, `status`, `stop`, `scale` and `job_spec`.

Traps:
- `submit` runs `python -m taid_ray.cli.job` on the cluster; the resolved configuration travels in the job's metadata.
- A driver is alive while it holds the lock of its directory or, where that is out of sight, touches live.json (`run.live`);
  `state` is the table of what follows from that. `stop` signals no process that does not hold the lock.
- `status` reads files, and asks the dashboard for the replicas. It imports neither torch nor Ray before it must.
"""
