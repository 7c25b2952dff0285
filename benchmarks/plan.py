"""How far are `taid-ray plan` and its simulation from real runs?

For each of four configurations a real run on a local Ray, and beside it what the plan says: memory of a worker and of a
teacher's process, without and with `--measure`, and the time of a step by arithmetic and by simulation with the rates of
`--measure`. These come from fewer steps, and from another layout where the configuration has more than one worker or a
window of one. Step times are medians. Targets: memory within 15 %, time of a step within 30 %.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, in_fresh_process, local_ray, median, write
from taid_ray.cli.plan import UTILISATION
from taid_ray.cli.quickstart import quickstart_config
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.plan.calibration import Measured
from taid_ray.plan.forecast import forecast
from taid_ray.plan.forecast_type import Forecast
from taid_ray.plan.hardware import hardware_named
from taid_ray.plan.inputs import PlanInputs, read_models
from taid_ray.plan.rates import times_of

STEPS, WARM_UP = 40, 5
CPUS = 8
"""Logical ones, so that every layout finds a place; the machine's cores are shared."""
VOCABULARY, LENGTH = 8000, 256
STORIES = ROOT / "taid_ray" / "quickstart" / "tinystories_train.jsonl"
MEMORY_TARGET, TIME_TARGET = 0.15, 0.30


@dataclass(frozen=True)
class Trial:
    name: str
    what: str
    config: DistillConfig
    measured: DistillConfig
    """What --measure is given."""
    layout: str
    """That it measures, in words."""


def main() -> None:
    console = Console()
    with tempfile.TemporaryDirectory(prefix="taid-bench-") as scratch:
        in_fresh_process(make_models, Path(scratch))
        empty = in_fresh_process(empty_worker)
        with local_ray(CPUS, 1024):
            points = [point(trial, console, empty) for trial in trials(Path(scratch))]
    errors = {kind: worst(points, kind) for kind in ("worker", "replica", "arithmetic", "simulation")}
    target = {
        "memory": MEMORY_TARGET,
        "step_time": TIME_TARGET,
        "memory_met": max(errors["worker"], errors["replica"]) <= MEMORY_TARGET,
        "step_time_met": errors["simulation"] <= TIME_TARGET,
        "largest_errors": errors,
    }
    write("plan", {"target": target, "empty_worker_bytes": empty, "points": points}, tables(points, target))


def trials(scratch: Path) -> list[Trial]:
    def quick(name: str, *overrides: str) -> DistillConfig:
        return quickstart_config([f"train.steps={STEPS}", *overrides], str(scratch / name))

    def larger(name: str, *overrides: str) -> DistillConfig:
        tree = {
            "name": name,
            "out": str(scratch / name),
            "teacher": {"model": str(scratch / "teacher")},
            "student": {"model": str(scratch / "student"), "dtype": "float32"},
            "data": {"train": str(STORIES), "sequence_length": LENGTH, "valid_documents": 16, "block_documents": 256},
            "train": {"steps": STEPS, "batch_size": 4, "micro_batch_size": 1, "warmup_steps": 0},
        }
        return build_config(tree, overrides)

    small = str(scratch / "small")
    bound = ("student.model=" + small, "teacher.payload=topk", "train.micro_batch_size=2", "student.zero_stage=0")
    return [
        Trial("quickstart", "1 worker, 1 replica", quick("a"), quick("a"), "the same"),
        Trial(
            "zero-2",
            "2 workers of ZeRO 2, 1 replica",
            larger("zero-2", "student.workers=2"),
            larger("zero-2", "student.workers=2"),
            "1 worker",
        ),
        Trial(
            "teacher-bound",
            "1 worker of ZeRO 0, 1 replica, payload topk, window 1",
            larger("teacher-bound", *bound, "teacher.window=1"),
            larger("teacher-bound", *bound, "teacher.window=4"),
            "window 4",
        ),
        Trial(
            "local",
            "2 workers of ZeRO 3, each with its teacher",
            larger("local", "teacher.mode=local", "student.workers=2", "student.zero_stage=3"),
            larger("local", "teacher.mode=local", "student.workers=2", "student.zero_stage=3"),
            "1 worker",
        ),
    ]


def make_models(directory: Path) -> None:
    """A tokenizer of VOCABULARY pieces of the bundled stories, and a teacher (23M) and two students (18M, 4M) with random
    weights for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in STORIES.open()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    set_seed(0)
    for name, width, layers in (("teacher", 512, 6), ("student", 448, 6), ("small", 256, 2)):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(fast),
                hidden_size=width,
                intermediate_size=8 * width // 3,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                max_position_embeddings=LENGTH,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
        model.save_pretrained(directory / name)
        fast.save_pretrained(directory / name)


def empty_worker() -> int:
    """Resident bytes of a process that has imported what a student worker imports, and done nothing."""
    from taid_ray.plan.memory_watch import peak_bytes
    from taid_ray.student.deepspeed_internals import use_deepspeed_on

    use_deepspeed_on("cpu")
    import os

    import taid_ray.student.worker  # noqa: F401

    return peak_bytes(os.getpid())


def point(trial: Trial, console: Console, empty: int) -> dict[str, Any]:
    """Measures, plans, and runs one configuration."""
    from taid_ray.plan.measure import measure

    console.print(f"== {trial.name}: measuring", highlight=False)
    found = measure(trial.measured, console, reduced=True)
    hardware, models = hardware_named("cpu"), read_models(trial.config)
    plain = forecast(trial.config, models, hardware, utilisation=UTILISATION)
    planned = forecast(trial.config, models, hardware, utilisation=UTILISATION, measured=found)
    console.print(f"== {trial.name}: running", highlight=False)
    real = run(trial.config, console)
    arithmetic = times_of(PlanInputs(trial.config, models, hardware), planned.rates).step_s
    return {
        "name": trial.name,
        "what": trial.what,
        "measured_layout": trial.layout,
        "rates": asdict(planned.rates),
        "measuring_step_s": found.step_s,
        "cores": found.cores,
        "real": real,
        "step_s": {"arithmetic": arithmetic, "simulation": planned.times.step_s, "assumed rates": plain.times.step_s},
        "step_error": {
            "arithmetic": arithmetic / real["step_s"] - 1,
            "simulation": planned.times.step_s / real["step_s"] - 1,
        },
        "memory": memory(plain, planned, found, real, empty),
    }


def run(config: DistillConfig, console: Console) -> dict[str, Any]:
    """Median seconds of a step of a whole run, and the most its processes held."""
    from taid_ray.driver.launch import RunContext, run_distillation
    from taid_ray.files import read_metrics
    from taid_ray.plan.memory_watch import memory_watched
    from taid_ray.run.layout import METRICS_FILE

    with memory_watched(f"taid-teacher-{config.name}") as peaks:
        run_distillation(config, RunContext(console=console))
        found = peaks()
    lines = read_metrics(config.run_dir / METRICS_FILE)[WARM_UP:-4]  # the teacher has no more work in the last ones
    names = [name for name in lines[0] if name.endswith("_s") and name != "tokens_per_s"]
    return {name: median([line[name] for line in lines]) for name in names} | {
        "steps": len(lines),
        "worker_bytes": found["worker"],
        "replica_bytes": found.get("replica"),
    }


def memory(
    plain: Forecast, planned: Forecast, measured: Measured, real: dict[str, Any], empty: int
) -> dict[str, dict[str, float]]:
    """By role, bytes: of the real run, planned without and with --measure, with errors; of the worker also what is planned
    and found beyond an empty process."""
    own, reserve = plain.configured(), plain.hardware.reserved_bytes
    found = {
        "worker": {
            "real": real["worker_bytes"],
            "plain": own.bytes,
            "with measure": planned.configured().bytes,
            "counted": own.bytes - reserve,
            "beyond an empty process": real["worker_bytes"] - empty,
        }
    }
    if real["replica_bytes"]:
        rank, calibrated = (
            next(rank.bytes for rank in each.teacher_memory if rank.shards == each.shards) for each in (plain, planned)
        )
        found["replica"] = {"real": real["replica_bytes"], "plain": rank, "with measure": calibrated}
    for each in found.values():
        each |= {f"{kind} error": each[kind] / each["real"] - 1 for kind in ("plain", "with measure")}
    return found


def worst(points: list[dict[str, Any]], kind: str) -> float:
    """Largest error, of a plan with --measure."""
    if kind in ("worker", "replica"):
        found = [each["memory"][kind]["with measure error"] for each in points if kind in each["memory"]]
    else:
        found = [each["step_error"][kind] for each in points]
    return max(map(abs, found))


def tables(points: list[dict[str, Any]], target: dict[str, Any]) -> list[Table]:
    time = Table(
        title="Time of a step: plan and simulation with the rates of --measure, and the real run",
        caption=f"Target: within {TIME_TARGET:.0%}, {'met' if target['step_time_met'] else 'MISSED'} by the simulation.",
    )
    for column in (
        "configuration",
        "layout",
        "measured on",
        "real, s",
        "arithmetic, s",
        "error",
        "simulation, s",
        "error",
    ):
        time.add_column(column, justify="left" if column in ("configuration", "layout", "measured on") else "right")
    room = Table(
        title="Memory of a process, resident, at its fullest",
        caption=f"Target: within {MEMORY_TARGET:.0%}, {'met' if target['memory_met'] else 'MISSED'} with --measure.",
    )
    for column in ("configuration", "process", "real, MiB", "plan, MiB", "error", "with --measure, MiB", "error"):
        room.add_column(column, justify="left" if column in ("configuration", "process") else "right")
    for each in points:
        shown = [each["name"], each["what"], each["measured_layout"], f"{each['real']['step_s']:.3f}"]
        for kind in ("arithmetic", "simulation"):
            shown += [f"{each['step_s'][kind]:.3f}", f"{each['step_error'][kind]:+.0%}"]
        time.add_row(*shown)
        for role, found in each["memory"].items():
            cells = [each["name"], role, f"{found['real'] / 2**20:.0f}"]
            for kind in ("plain", "with measure"):
                cells += [f"{found[kind] / 2**20:.0f}", f"{found[f'{kind} error']:+.0%}"]
            room.add_row(*cells)
    return [time, room]


if __name__ == "__main__":
    main()
