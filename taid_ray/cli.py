"""The `taid-ray` command. Exit code 0: done, 2: something the user can put right (one message), 1: anything else."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from taid_ray.config import DistillConfig, load_config
from taid_ray.errors import TaidRayError

app = typer.Typer(
    help="Distil a large language model into a small one with TAID, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted key=value pairs, for example schedule.t_start=0.3.")
]
Out = Annotated[str | None, typer.Option(help="Run directory (default: the config's `out`, else runs/NAME).")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")], overrides: Overrides = None, out: Out = None
) -> None:
    """Distil as a configuration says; leaves a run directory with the model, metrics and plots."""
    run(load_config(config, [*(overrides or []), *([f"out={out}"] if out else [])]))


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Distil the bundled 260,000-parameter story teller into a smaller one on this machine (two to three minutes)."""
    from taid_ray.example import quickstart_config, show_samples

    config = quickstart_config(overrides or [], out)
    run(config)
    show_samples(config, Console())


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model to measure: hub name or directory, for example RUN/model.")],
    teacher: Annotated[str, typer.Option(help="Teacher to compare with: hub name or directory.")],
    data: Annotated[str, typer.Option(help="Data: hub name, local file or directory.")],
    overrides: Overrides = None,
    rouge: Annotated[bool, typer.Option(help="Also generate responses and score them with ROUGE-L.")] = False,
) -> None:
    """Cross-entropy, perplexity and KL to the teacher of a model on data, in this process.

    Extra arguments are keys of the data section, for example format=prompt_response sequence_length=512.
    """
    from taid_ray.measure import evaluate_model, measurement_table

    keys = [override if "." in override.partition("=")[0] else f"data.{override}" for override in overrides or []]
    Console().print(measurement_table(evaluate_model(model, teacher, data, keys, rouge)))


@app.command()
def check(config: Annotated[Path, typer.Argument(help="YAML configuration.")], overrides: Overrides = None) -> None:
    """Check a configuration, its models and its data without starting anything."""
    from taid_ray.preflight import prepare

    plan = prepare(load_config(config, overrides or []))
    Console().print(f"ok: {plan.total_steps} optimizer steps, {plan.vocabulary.num_shared} shared token ids")


def run(config: DistillConfig) -> None:
    """Distils and prints where everything is."""
    from taid_ray.launch import distill
    from taid_ray.report import result_table

    result = distill(config)
    console = Console()
    console.print(result_table(result.summary))
    console.print(f"run directory: {result.path}", soft_wrap=True, highlight=False)
    console.print(
        "  model/ (Hugging Face)  summary.json  metrics.jsonl  report/training.png  config.yaml", highlight=False
    )


def main() -> None:
    """Entry point of the console script: one line for what a user can put right, a traceback for our own mistakes."""
    guarded(app)


def guarded(command: Callable[..., Any]) -> None:
    try:
        command()
    except TaidRayError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
