"""The same run on other numbers of workers and in other ZeRO stages, one after another: the same trajectory."""

import signal

import pytest

from tests.support.harness import NewRun, Run, small_config

LAYOUTS = (2, 2), (1, 3), (2, 1)
"""Workers and ZeRO stage of each driver."""
EVERY = 9
"""Steps that each of them makes, the last one more."""
CLOSE = 1e-5


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_stop_and_resume_in_another_layout(new_run: NewRun, baseline: Run) -> None:
    run = new_run(small_config("chaos-resize"))
    for number, (workers, zero_stage) in enumerate(LAYOUTS, 1):
        run.start(f"student.workers={workers}", f"student.zero_stage={zero_stage}")
        if number < len(LAYOUTS):
            run.wait_for_step(EVERY * number)
            assert len(run.pids("RayTrainWorker")) == workers
            run.signal_driver(signal.SIGINT)
            run.wait_for_end(130)
            run.check_nothing_left()
            assert f"stopped after step {run.step}, of which there is a checkpoint" in run.log  # nothing was repeated
    run.wait_for_end()
    assert run.attempts == len(LAYOUTS)
    lines, expected = run.lines(), baseline.lines()
    assert [line["step"] for line in lines] == list(range(1, len(expected) + 1))
    for line, other in zip(lines, expected, strict=True):
        for key in ("t", "loss", "kl", "momentum", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=CLOSE, abs=CLOSE), f"{key} of step {line['step']}"
        for key in ("tokens", "samples_seen", "lr"):
            assert line[key] == other[key]
    for moment in ("before", "after"):
        assert run.summary[moment] == pytest.approx(baseline.summary[moment], rel=CLOSE, abs=CLOSE)
