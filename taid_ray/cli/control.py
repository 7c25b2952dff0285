"""`taid-ray submit`, `status`, `scale` and `stop`."""

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from taid_ray.config.schema import DistillConfig, load_config
from taid_ray.errors import ConfigError
from taid_ray.report.format import print_line
from taid_ray.run.live import AUTH_MODE, live_pool, read_live

if TYPE_CHECKING:
    from taid_ray.control.status import Status

Address = Annotated[
    str | None,
    typer.Option(help="Of the cluster's Jobs API, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS)."),
]
Directory = Annotated[Path, typer.Argument(help="Directory of a run or search.")]


class JobEnd(SystemExit):
    """Ends this process with the exit code of a job on the cluster."""


def submit(
    config: Annotated[Path, typer.Argument(help="YAML configuration, of this machine.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted key=value pairs.")] = None,
    address: Address = None,
    out: Annotated[str | None, typer.Option(help="Run directory: an absolute path of the cluster.")] = None,
    space: Annotated[Path | None, typer.Option(help="YAML search space: submits a search, as `tune`.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="As `tune --trials`.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="As `tune --max-concurrent`.")] = None,
    share_outputs: Annotated[bool, typer.Option(help="As `tune --share-outputs`.")] = True,
    wait: Annotated[bool, typer.Option(help="Follow the job's log; its exit code is this command's.")] = True,
    working_dir: Annotated[
        Path | None, typer.Option(help="Directory to send along: relative paths are relative to it.")
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML with more of Ray's runtime_env, for example env_vars and pip.")
    ] = None,
) -> None:
    """Distil on a cluster, as a Ray job. What is under way already is followed; what was stopped or has failed goes on.

    Ctrl-C leaves the job running."""
    loaded = load_config(config, overrides or [], {} if out is None else {"out": out})
    search = search_options(loaded, space, trials, max_concurrent, share_outputs)
    from taid_ray.control.submit import SubmitOptions
    from taid_ray.control.submit import submit as submit_job

    options = SubmitOptions(search, address, wait, working_dir, runtime_env)
    code = submit_job(loaded, options, partial(print_line, Console()), write)
    if code is not None:
        raise JobEnd(code)


def search_options(
    loaded: DistillConfig, space: Path | None, trials: int | None, max_concurrent: int | None, share_outputs: bool
) -> dict[str, Any] | None:
    """The `search` of a JobSpec. Raises ConfigError if the space does not fit the configuration."""
    if space is None:
        if (trials, max_concurrent, share_outputs) != (None, None, True):
            raise ConfigError(
                "--trials, --max-concurrent and --no-share-outputs are a search's; give --space, too, or leave them out"
            )
        return None
    from taid_ray.config.space import load_space

    wanted = load_space(space, {} if trials is None else {"trials": trials})
    if loaded.train.steps is not None:
        wanted.check(loaded.model_dump(mode="json"), loaded.train.steps)
    options = {"out": loaded.out, "max_concurrent": max_concurrent, "share_outputs": share_outputs}
    return {"space": wanted.model_dump(mode="json"), "options": options}


def write(text: str) -> None:
    """Prints a part of a job's log at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def status(
    run: Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: seconds, nats per token.")] = False,
) -> None:
    """Show the state of a run or search, its speed, and its last checkpoint; it need not be running."""
    from taid_ray.control.status import read_status, replica_states

    current = read_status(run)
    replicas = replica_states(current.driver) if current.driver and current.state != "dead" else None
    if as_json:
        print(json.dumps(asdict(current) | {"teacher_replicas": replicas}, indent=2))
        return
    for key, value in rows(current, replicas):
        print(f"{key:<12}{value}")


def rows(current: "Status", replicas: dict[str, int] | None) -> list[tuple[str, str]]:
    """Names and values that `taid-ray status` prints, the most important ones first."""
    from taid_ray.report.format import shown_seconds

    def ago(seconds: float) -> str:
        return f"{shown_seconds(max(0.0, seconds))} ago"

    late = "" if current.ended_age_s is None else f" ({ago(current.ended_age_s)})"
    shown = [("run" if current.trials is None else "search", current.path), ("state", current.headline + late)]
    if current.trials is not None:
        counts = [f"{count} {status}" for status, count in current.trials.items() if status != "all"]
        shown.append(("trials", f"{', '.join(counts) or 'none begun'}; {current.trials['all']} in all"))
    if current.best:
        shown.append(("best", json.dumps(current.best)))
    if current.step_age_s is not None:
        left = f"; about {shown_seconds(current.left_s)} left" if current.left_s and current.state == "training" else ""
        shown.append(("step", f"{current.step} of {current.total_steps or '?'}, {ago(current.step_age_s)}{left}"))
        figures = {"t": current.t, "loss": current.loss, "KL": current.kl}
        known = ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items() if figure is not None)
        shown.append(("figures", f"{known} (nats per token)"))
    if current.step_s:
        share = current.teacher_wait_share
        waiting = "" if share is None else f", {share:.0%} of it waiting for the teacher"
        shown.append(("speed", f"{current.tokens_per_s:,.0f} tokens/s, {current.step_s:.3g} s a step{waiting}"))
    if last := current.validation:
        compared = f"KL {last['kl']:.4f}, " if "kl" in last else ""
        shown.append(("validation", f"{compared}cross-entropy {last['cross_entropy']:.4f} after step {last['step']}"))
    if current.checkpoints and current.state != "finished":
        whole = current.checkpoint
        newest = f"step {whole.step}, {ago(whole.age_s)}, in " if whole else "none seen in "
        shown.append(("checkpoint", newest + current.checkpoints))
    if last := current.attempt:
        shown.append(
            ("attempts", f"{current.attempts}, the last with {last['workers']} worker(s), began {last['began']}")
        )
    if replicas is not None:
        states = ", ".join(f"{count} {state}" for state, count in sorted(replicas.items()))
        shown.append(("teacher", f"replicas: {states or 'none'}"))
    if driver := current.driver:
        job = f", Ray job {driver.submission}" if driver.submission else ""
        shown.append(("driver", f"process {driver.pid} on {driver.host}{job}"))
        if driver.address:
            shown.append(("cluster", driver.address + (f", dashboard {driver.dashboard}" if driver.dashboard else "")))
    return shown


def scale(
    run: Annotated[Path, typer.Argument(help="Directory of a live run.")],
    teacher: Annotated[int, typer.Option(help="Replicas of the teacher to have from now on.")],
) -> None:
    """Give the teacher pool of a live run another number of replicas. No batch is lost or repeated."""
    if teacher < 1:
        raise ConfigError(f"--teacher: a pool needs at least one replica (found {teacher})")
    live = live_pool(run)
    if live.auth_mode is not None:
        os.environ.setdefault(AUTH_MODE, live.auth_mode)  # Ray reads it when it is imported
    from taid_ray.control.scale import scale_teacher

    scale_teacher(run, live, teacher, partial(print_line, Console()))


def stop(run: Directory, address: Address = None) -> None:
    """End a live run or search with a checkpoint, from any machine if it is a Ray job. The same command goes on with it."""
    from taid_ray.control.status import read_status

    read_status(run)  # whether it is one
    if (live := read_live(run)) and live.auth_mode is not None:
        os.environ.setdefault(AUTH_MODE, live.auth_mode)  # Ray reads it when it is imported
    from taid_ray.control.stop import stop as stop_run

    stop_run(run, address, partial(print_line, Console()))
