"""Searches with Ray Tune: the driver of a search, its trials, the book of trials, its directory, callbacks.

Others use `driver` (run_search, SearchResult). What Ray Tune is given stands in `tuning`.

Traps:
- A trial (`trial.run_trial`) runs in Ray Tune's process and is itself a driver (`driver.launch.run_distillation`), with what is
  there already (`RunContext`: pool, log, the request to stop, who is told of validations).
- The truth is in trials.json (`book`) and in the trials' run directories; known trials are replayed into a new Tuner, whose
  own state is never read back.
"""
