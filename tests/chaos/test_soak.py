"""Runs that are hurt at random moments until they are done, for as long as one likes: `make soak MINUTES=10`."""

import os
import time
from collections import Counter
from random import Random

import pytest

from tests.support.failures import AT_ANY_TIME
from tests.support.harness import GONE_S, NewRun, Run, Tree, check_same_result, small_config

MINUTES = float(os.environ.get("TAID_SOAK_MINUTES", "10"))
LONGEST_PAUSE_S = 40.0
"""Between two failures. A run needs some 15 s to recover, so every third failure or so comes before it has."""


def soak_config(name: str) -> Tree:
    return small_config(
        name, train={"steps": 60}, student={"timeout_s": 20, "max_failures": 50}, teacher={"timeout_s": 90}
    )


def hurt_until_done(run: Run, rng: Random) -> Counter[str]:
    """How often what happened to the run. It is started again if, and only if, that ended its driver."""
    happened: Counter[str] = Counter()
    run.start()
    while not run.ended_within(rng.uniform(1, LONGEST_PAUSE_S)):
        failure = rng.choice(AT_ANY_TIME)
        victims = failure.victims(run, rng)
        if not victims or run.ended:
            continue
        failure.strike(victims)
        happened[failure.name] += 1
        if failure.ends == "driver":
            run.ended_within(GONE_S)
            if run.exit_code != 0:  # else the signal came too late
                run.wait_for_end(failure.exit_code)
                run.start()
    run.wait_for_end()
    return happened


@pytest.mark.soak
@pytest.mark.timeout(60 * MINUTES + 1800)
def test_soak(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    undisturbed = new_run(soak_config("soak-baseline"))
    undisturbed.start()
    undisturbed.wait_for_end()
    usual_s = time.monotonic() - start
    happened: Counter[str] = Counter()
    seed = lost = repeated = leaked = 0
    lost_s = 0.0
    while not seed or time.monotonic() - start < 60 * MINUTES:
        seed, began = seed + 1, time.monotonic()
        run = new_run(soak_config(f"soak-{seed}"))
        happened += hurt_until_done(run, Random(seed))
        lost_s += time.monotonic() - began - usual_s
        run.check_left_cluster(GONE_S)
        leaked += len(run.left_on_cluster() + run.left_on_disk())
        steps = [line["step"] for line in run.lines()]
        repeated += len(steps) - len(set(steps))
        lost += undisturbed.summary["samples"] - run.summary["samples"]
        check_same_result(run, undisturbed)
        with capsys.disabled():
            minutes = (time.monotonic() - start) / 60
            print(
                f"\n{minutes:.1f} min: run {seed} is done after {happened.total()} failures in all", end="", flush=True
            )
    rows = {f"injected: {name}": count for name, count in sorted(happened.items())} | {
        "failures injected": happened.total(),
        "runs, each bit-identical to the undisturbed one": seed,
        "s lost per failure": round(lost_s / max(1, happened.total()), 1),
        "samples lost": lost,
        "samples repeated in committed steps": repeated,
        "actors and files leaked": leaked,
    }
    with capsys.disabled():
        print("\n".join(["", "| soak | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]))
    assert (lost, repeated, leaked) == (0, 0, 0)
    assert seed and happened
