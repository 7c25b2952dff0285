"""Checkpoints: the store, saving beside the training, restoring. Free of the layout, and of Ray.

Others use `store` (CheckpointStore, TrainingState), `save.CheckpointWriter` and `restore` (restore, Checkpoint).

Traps:
- A checkpoint fits any number of workers and any ZeRO stage: `student.state` gathers every parameter whole, with its moments.
- Nothing that follows from the step's number is stored: learning rate, random numbers (`Student.begin_step`).
- Nothing is pickled: who can write to the storage can stop a run, not run code in it.
"""
