"""`taid-ray plan --measure` on the session's cluster: real steps, and a plan that is computed from them."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from taid_ray.cli.plan import plan
from taid_ray.cli.quickstart import quickstart_config
from taid_ray.plan import rates as plan_rates


@pytest.mark.more
@pytest.mark.timeout(300)
def test_real_steps_take_the_place_of_assumptions(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan comes out near what was measured, nothing is left behind, and the run itself is not begun."""
    from ray import serve

    monkeypatch.setattr(plan_rates, "WORKERS", (1, 4))
    out = tmp_path / "runs" / "small"
    config = quickstart_config(["train.batch_size=4", "train.micro_batch_size=4"], str(out))
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, [str(file), "--measure", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)  # progress goes to stderr
    assert list(tmp_path.iterdir()) == [file] and not [name for name in serve.status().applications if "small" in name]

    assert found["hardware"]["name"] == "cpu" and found["rates"]["measured"]  # by what is here
    rates, here = found["rates"], found["calibration"]
    assert (here["workers"], here["replicas"]) == (1, 1) and here["rates"] == rates  # the layout is the plan's
    for name in ("teacher_s", "forward_s", "loss_s", "backward_s", "optimizer_s", "data_s", "request_s", "read_s"):
        assert 0 < rates[name] < 2, name
    # What is not in these phases is waiting for the teacher or the scheduler.
    own = sum(rates[f"{name}_s"] for name in ("forward", "loss", "backward", "optimizer", "data"))
    assert own < 1.5 * here["step_s"] and here["step_s"] < 1.5 * (own + rates["teacher_s"] + rates["request_s"])
    assert found["times"]["step_s"] == pytest.approx(here["step_s"], rel=0.5)
    # A process with torch and Ray, and models of a few MiB; the plan of the same layout says the same.
    for count in (here["worker_bytes"], here["replica_bytes"]):
        assert 300 * 2**20 < count < 1.5 * 2**30
    worker = next(each for each in found["worker_memory"] if each["zero_stage"] == 2 and not each["checkpointing"])
    assert worker["bytes"] == pytest.approx(here["worker_bytes"])
