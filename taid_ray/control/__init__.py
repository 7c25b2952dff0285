"""Live runs from outside: submit, jobs, status, stop, scale.

Others use `submit`, `jobs`, `status`, `stop`, `scale` and `job_spec`.

Traps:
- `submit` runs `python -m taid_ray.cli.job` on the cluster; the resolved configuration travels in the job's metadata.
- `status` reads files, and asks the dashboard for the replicas. It imports neither torch nor Ray before it must.
"""
