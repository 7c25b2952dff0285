"""Tracking of a run outside of its files: TensorBoard, W&B and MLflow by the driver, Prometheus by every process.

Others use `follow` (tracking_session, check_installed, tell_stopped) and `prometheus` (Instruments, StudentGauges).

Traps:
- The driver follows metrics.jsonl and validation.jsonl (`tail`) and sends what is new to the `sinks`; workers send nothing.
- Prometheus is fed by rank 0, by the teacher's replicas and, for requests asked again, by every worker. A new metric goes
  into the table of `prometheus` and into the Grafana dashboard; a test compares the two.
"""
