"""`taid-ray plan`: sizes, memory, time, cost and scaling of a run, before anything is started.

Others use `forecast.forecast`, `from_run`, `inputs`, `hardware` and `tables`.

Traps:
- `trace` runs the real modelling code under FakeTensorMode; `memory` adds DeepSpeed's buffers by formulas that were read from
  0.19.8: check them when its version moves.
- The simulation (`simulation`, `simulation_kernel`, `pipeline`) follows the training loop event by event, without torch.
"""
