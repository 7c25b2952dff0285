"""The TAID scheduler, which owns t: schedule and aggregation of the loss (pure Python), the actor, and its two clients.

Others use `client.SchedulerClient` (a student worker's side), `owner.SchedulerOwner` (the driver's side), `aggregate`
(LossSums, StepResult, the words GO_ON, SAVE and STOP) and `schedule`.

Traps:
- The actor keeps nothing on disk. Each report and heartbeat carries the newest result its sender knows
  (`aggregate.LossAggregator.seed`), which is how a restarted actor comes back bit for bit.
- All ranks stop or save after the same step, because the request travels with the loss report and comes back in its
  StepResult.
- Rank 0 begins an attempt (`SchedulerClient.begin`), which shuts out all earlier ones, before it reads a checkpoint. Attempts
  are numbered in run.json, so that no clock decides which of two is the newer one.
- The actor is also where the workers' notes and the driver's word about the teacher pool meet (`board`).
"""
