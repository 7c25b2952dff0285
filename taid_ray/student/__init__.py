"""The student worker's process: the DeepSpeed engine, prefetching, THE LOOP (`loop`), the work between steps, evaluation.

Others use `worker.run_worker`, `spec` (what passes between driver and worker), `prefetch.Prefetcher`, `seeing` (does a model
look at images?), `evaluate` (`taid-ray eval`), and of it `generation` (greedy answers, also to images) and `rouge`.

A worker, top to bottom: `context.connect` -> `worker.build` -> `open_teacher` -> `worker.TrainingRun`, which runs the loop with
`hooks.StepHooks`: `validator.Validator`, `telemetry.Telemetry` (files, Prometheus), `checkpoints.StudentCheckpoints`.

Traps:
- The loss runs inside the head module's own forward (`engine.patch_head_forward`), because under ZeRO-3 the head's
  weight is whole only there. Adapters on the head are registered as external parameters for the same reason.
- `engine_check` computes probes in the engine before the first step. Nothing of the training may change by that.
- ZeRO 0 in float32 clips in an optimizer hook of ours: DeepSpeed keeps no norm there. ZeRO 0 with bfloat16 is refused.
- The denominator of the loss comes from the batch itself; the loop compares it with what the scheduler actor summed up.
- Where a step's time goes is measured by one `clock.PhaseClock`, which loop, prefetcher and engine share.
- DeepSpeed on a CPU would compile its shared-memory collectives at the first start.
  `deepspeed_internals.use_deepspeed_on` declares that operator absent, so nothing compiles; call it before anything imports
  `deepspeed`.
- All that DeepSpeed keeps private and the package uses stands in `deepspeed_internals`; pyproject.toml bounds its version.
"""
