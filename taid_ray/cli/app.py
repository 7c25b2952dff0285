"""The `taid-ray` command.

Exit code 0: done, 2: what the user can put right (one message), 130: Ctrl-C, 143: SIGTERM, 1: anything else.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from taid_ray.cli import cache as cache_commands
from taid_ray.cli import data as data_commands
from taid_ray.cli import demo as demo_commands
from taid_ray.cli.compare import compare
from taid_ray.cli.control import JobEnd, scale, status, stop, submit
from taid_ray.cli.plan import plan
from taid_ray.cli.report import report
from taid_ray.cli.simulate import simulate_command
from taid_ray.config.schema import DistillConfig, load_config
from taid_ray.driver.signals import ATTEMPT_THREAD
from taid_ray.errors import TaidRayError, WorkerError
from taid_ray.report.format import print_line

if TYPE_CHECKING:
    from taid_ray.config.space import Space

STOPPED = (130, 143)
"""Exit codes after Ctrl-C and SIGTERM."""
SAMPLES_SHOWN = 2
"""Samples of the training data at the end of `check`."""


def show_version(wanted: bool) -> None:
    """Prints the version and ends, if wanted."""
    if wanted:
        print(f"taid-ray {version('taid-ray')}")
        raise typer.Exit


app = typer.Typer(
    help="Distil a large language model into a small one with TAID, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(compare)
app.command()(report)
app.command("simulate")(simulate_command)
for command in (submit, status, scale, stop):
    app.command()(command)
app.add_typer(cache_commands.app, name="cache")
app.add_typer(data_commands.app, name="data")
app.add_typer(demo_commands.app, name="demo")
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted key=value pairs, for example schedule.t_start=0.3.")
]
DataKeys = Annotated[
    list[str] | None,
    typer.Argument(help="Keys of the data section (sequence_length=512), or dotted ones (teacher.dtype=bfloat16)."),
]
Out = Annotated[str | None, typer.Option(help="Run directory (default: the config's `out`, else runs/NAME).")]


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Distil a large language model into a small one with TAID, on a Ray cluster."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")], overrides: Overrides = None, out: Out = None
) -> None:
    """Distil as a configuration says. The run directory then holds the model, its metrics and report.html.

    The same command goes on with a run that was stopped or has failed, from its last checkpoint."""
    run(load_config(config, overrides or [], {} if out is None else {"out": out}))


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Out = None,
    vision: Annotated[
        bool, typer.Option("--vision", help="A model that answers questions on pictures instead.")
    ] = False,
) -> None:
    """Distil the bundled tiny story teller into a smaller one on this machine (two to three minutes)."""
    if vision:
        from taid_ray.cli.quickstart_vision import draw_scenes, show_answers, vision_config

        config = vision_config(overrides or [], out)
        draw_scenes(config)
        run(config)
        show_answers(config, Console())
        return
    from taid_ray.cli.quickstart import quickstart_config, show_samples

    config = quickstart_config(overrides or [], out)
    run(config)
    show_samples(config, Console())


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="YAML configuration that all trials start from.")],
    space: Annotated[Path, typer.Option(help="YAML search space, for example tune_spaces/taid.yaml.")],
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many trials, instead of the space's number.")] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time (default: as many as the cluster has room for).")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The search's directory (default: runs/NAME-search).")] = None,
    share_outputs: Annotated[
        bool, typer.Option(help="Let the teacher compute each sample once for all trials.")
    ] = True,
) -> None:
    """Search alpha, beta, t_start or any other keys: many students, one teacher.

    The same command goes on with a search that was interrupted."""
    from taid_ray.config.space import load_space

    base = load_config(config, overrides or [])
    wanted = load_space(space, {} if trials is None else {"trials": trials})
    if base.train.steps is not None:  # else `search` looks at the data first
        wanted.check(base.model_dump(mode="json"), base.train.steps)
    search(base, wanted, out, max_concurrent, share_outputs)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model to measure: hub name or directory, for example RUN/model.")],
    teacher: Annotated[str, typer.Option(help="Teacher to compare with: hub name or directory.")],
    data: Annotated[str, typer.Option(help="Data: hub name, local file or directory.")],
    overrides: DataKeys = None,
    rouge: Annotated[
        bool, typer.Option("--rouge", help="Also score generated responses: ROUGE-L, exact match.")
    ] = False,
) -> None:
    """Measure a model on data: cross-entropy, perplexity and KL to the teacher."""
    from taid_ray.student.evaluate import evaluate_model, measurement_table

    with named_as_arguments():
        evaluation = evaluate_model(model, teacher, data, [dotted(override) for override in overrides or []], rouge)
    console = Console()
    console.print(measurement_table(evaluation))
    for note in evaluation.notes:
        print_line(console, note)


@app.command()
def check(config: Annotated[Path, typer.Argument(help="YAML configuration.")], overrides: Overrides = None) -> None:
    """Check a configuration, its models and its data, without starting anything."""
    from taid_ray.driver.notes import say_notes
    from taid_ray.driver.preflight import first_samples, prepare
    from taid_ray.tracking.follow import check_installed

    loaded = load_config(config, overrides or [])
    check_installed(loaded)
    spec = prepare(loaded)
    console = Console()
    steps = f"{spec.total_steps}" if spec.total_steps else f"{loaded.train.epochs:g} epochs of"
    console.print(f"ok: {steps} optimizer steps, {spec.vocabulary.num_shared} shared token ids")
    say_notes(loaded, spec, partial(print_line, console))
    data_commands.print_samples(console, first_samples(loaded, SAMPLES_SHOWN)[1], shorten=True)


def run(config: DistillConfig) -> None:
    """Distils and prints where everything is."""
    from taid_ray.run.directory import inspect_run_dir

    state = inspect_run_dir(config)
    console = Console()
    console.print("loading Ray, torch and transformers", highlight=False)
    from taid_ray.driver.launch import distill
    from taid_ray.report.card import result_table

    if state == "finished":
        print_line(console, f"this run is finished: {config.run_dir}")
    result = distill(config)
    console.print(result_table(result.summary))
    print_line(console, f"run directory: {result.path}")
    console.print("  model/ (Hugging Face)  report.html  summary.json  metrics.jsonl  config.yaml", highlight=False)


def search(
    base: DistillConfig,
    wanted: "Space",
    out: str | None,
    max_concurrent: int | None,
    share_outputs: bool,
) -> None:
    """Searches and prints where everything is."""
    console = Console()
    console.print("loading Ray, torch and transformers", highlight=False)
    from taid_ray.report.search_notes import search_notes
    from taid_ray.report.search_page import trials_table
    from taid_ray.search.driver import run_search

    result = run_search(base, wanted, out, max_concurrent, share_outputs)
    console.print(trials_table(result.search))
    for note in search_notes(result.search):
        print_line(console, f"note: {note}")
    print_line(console, f"search directory: {result.path}")
    if result.best is None:
        raise WorkerError(f"no trial finished; {result.path}/trials/*.error and *.log say why")
    console.print("  report.html  best.yaml (for taid-ray train)  trials/NAME/ (runs)", highlight=False)


def dotted(override: str) -> str:
    """The dotted form of an override of `eval`, whose keys without a section belong to `data`."""
    key = override.partition("=")[0]
    return override if "." in key or key == "device" else f"data.{override}"


@contextmanager
def named_as_arguments() -> Iterator[None]:
    """Replaces keys in error messages by the arguments of `eval` that they were given as."""
    names = {"student.model": "MODEL", "teacher.model": "--teacher", "data.valid": "--data"}
    try:
        yield
    except TaidRayError as error:
        message = re.sub(r"\b(student\.model|teacher\.model|data\.valid)\b", lambda key: names[key[0]], str(error))
        raise type(error)(message) from error


def main() -> None:
    """Entry point of the console script."""
    guarded(app)


def guarded(command: Callable[..., Any]) -> None:
    """Runs an entry point: one message for what a user can put right, a traceback for our own mistakes."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        command()
    except TaidRayError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, SystemExit) as end:
        code = end.code if isinstance(end, SystemExit) else STOPPED[0]  # typer makes Ctrl-C a SystemExit
        if code not in STOPPED or isinstance(end, JobEnd):
            raise
        print("interrupted", file=sys.stderr)
        if any(thread.name == ATTEMPT_THREAD for thread in threading.enumerate()):
            # Ended without waiting for the workers: that thread still waits inside Ray, and crashes with the interpreter.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(code))
        raise SystemExit(code) from None
