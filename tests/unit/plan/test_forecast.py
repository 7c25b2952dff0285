"""`taid-ray plan` as a user meets it: the bundled models, refusals, and a large pair that only its shapes are known of."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from transformers import MixtralConfig, Qwen2Config
from typer.testing import CliRunner

from taid_ray.cli.plan import plan
from taid_ray.cli.quickstart import quickstart_config
from taid_ray.config.schema import DistillConfig, build_config, load_config
from taid_ray.driver.preflight import prepare
from taid_ray.errors import ConfigError
from taid_ray.plan import rates as plan_rates
from taid_ray.plan.forecast import Forecast, forecast
from taid_ray.plan.hardware import hardware_named
from taid_ray.plan.inputs import Models, PlanInputs, read_models
from taid_ray.plan.tables import show
from taid_ray.plan.trace import Pass, shape_of, trace
from tests.support.paths import CONFIGS

CPU = hardware_named("cpu")
GIB = 2**30


@pytest.fixture(autouse=True)
def few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands take seconds to simulate."""
    monkeypatch.setattr(plan_rates, "WORKERS", (1, 4))


def quickstart(*overrides: str) -> DistillConfig:
    return quickstart_config(overrides, "unused")


def planned(config: DistillConfig, hardware: Any = CPU, **options: Any) -> Forecast:
    return forecast(PlanInputs(config, read_models(config), hardware), **({"utilisation": 0.4} | options))


def shown(found: Forecast) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(found, console)
    return console.export_text()


def test_a_run_without_a_teacher_is_planned_without_one() -> None:
    changes = ["loss.name=sft", "student.init=pretrained", "student.layers=null"]
    student = f"student.model={quickstart().given_teacher.model}"
    alone, evaluated = (planned(quickstart(*changes, student, *more)) for more in (["teacher=null"], []))
    text, figures = shown(alone), alone.as_dict()
    assert (
        "replicas that hide" not in text and "teacher.payload" not in text and "the student is the bottleneck" in text
    )
    assert (figures["mode"], figures["payload"], figures["object_store_bytes"]) == ("none", None, 0.0)
    assert "teacher" not in [name for name in figures if name == "teacher"] and alone.rates.teacher_s == 0.0
    assert alone.configured.parts["teacher head"] == alone.configured.parts["prefetch window"] == 0.0
    assert alone.processors == 1 and [point.replicas for point in alone.scaling] == [0, 0]
    # A teacher for validations costs its process and its head, and no time of the steps.
    assert (
        evaluated.processors == 2
        and len(evaluated.shard_memory) > 0
        and "asked in validations only" in shown(evaluated)
    )
    assert evaluated.configured.parts["teacher head"] > 0
    assert evaluated.times == alone.times and evaluated.as_dict()["wire_bytes_per_s"] == 0.0
    assert planned(quickstart(*changes[1:], student)).times.loss_s > alone.times.loss_s


@pytest.fixture(scope="module")
def swallow() -> Models:
    """Shapes of Qwen2.5-32B and 1.5B, as their configs on the hub say, cut to an eighth of their layers."""
    common = {"max_position_embeddings": 32768, "dtype": "bfloat16"}
    teacher = Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=8, num_attention_heads=40,
        num_key_value_heads=8, tie_word_embeddings=False, **common,
    )  # fmt: skip
    student = Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=4, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True, **common,
    )  # fmt: skip
    return Models(teacher, student, 151665)


def test_known_models_have_their_known_sizes() -> None:
    large = Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    assert shape_of(large).parameters == 32_763_876_352  # Qwen2.5-32B
    small = Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    assert shape_of(small).parameters == 1_543_714_304  # Qwen2.5-1.5B


def test_a_token_meets_only_the_chosen_experts() -> None:
    def matmul(chosen: int) -> int:
        return shape_of(
            MixtralConfig(
                vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=chosen,
            )
        ).matmul  # fmt: skip

    assert matmul(2) - matmul(1) == 3 * 16 * 32


def test_the_quickstart(tmp_path: Path) -> None:
    config = quickstart()
    found = planned(config, price_per_hour=2.0)
    assert found.inputs.models.num_shared == prepare(config).vocabulary.num_shared
    assert found.inputs.workload.tokens == 16 * 256
    assert found.whole is not None and found.whole.tokens == 250 * 16 * 256
    assert found.whole.cost == pytest.approx(2 * 2 * found.whole.hours)  # two cores: one worker, one shard
    assert {memory.zero_stage for memory in found.worker_memory} == {0, 1, 2, 3}
    assert all(memory.fits for memory in found.worker_memory) and found.configured.zero_stage == 2
    assert [rank.shards for rank in found.shard_memory] == [1, 2, 4]  # four key-value heads
    assert found.inputs.wire_bytes["hidden"] == 64 * 4
    assert found.object_store_bytes == 2 * 4 * 16 * 256 * 256
    assert json.loads(json.dumps(found.as_dict()))["times"]["step_s"] == found.times.step_s
    assert max(map(len, shown(found).splitlines())) <= 100


def test_tokens_replace_the_runs_length() -> None:
    found = planned(quickstart(), tokens=1e6)
    assert found.whole is not None and found.whole.tokens == 1e6
    assert found.whole.hours == pytest.approx(found.per_billion.hours / 1000)
    assert planned(quickstart("train.steps=null", "train.epochs=1")).whole is None


def test_a_local_teacher_lives_in_the_worker() -> None:
    pooled, local = planned(quickstart()), planned(quickstart("teacher.mode=local"))
    assert local.shard_memory == [] and local.object_store_bytes == 0
    assert local.processors == pooled.processors - 1
    assert local.times.step_s == pytest.approx(pooled.times.student_s + pooled.times.teacher_s)
    assert local.configured.parts["teacher"] > 4 * local.inputs.teacher.parameters
    assert "in each student worker" in shown(local)


def test_a_cache_needs_no_teacher(tmp_path: Path) -> None:
    found = planned(quickstart("teacher.mode=cache", f"cache.directory={tmp_path}"))
    assert found.shard_memory == [] and found.times.teacher_s == 0 == found.times.replicas
    assert found.times.bottleneck == "student"
    assert "none: all answers are in the cache" in shown(found)


def test_checkpointing_saves_activations_and_costs_a_forward_pass(swallow: Models) -> None:
    config = large("student.gradient_checkpointing=false")
    plain, again = PlanInputs(config, swallow, CPU), PlanInputs(large(), swallow, CPU)
    assert plain.flops.recompute == 0 and again.flops.recompute == again.flops.forward
    assert again.student_activations(True).saved < again.student_activations(False).saved / 5


def large(*overrides: str) -> DistillConfig:
    return load_config(CONFIGS / "tinyswallow.yaml", overrides)


def test_a_large_pair(swallow: Models) -> None:
    """Hand-checked parts of the plan for four workers on H100s."""
    gpu = hardware_named("h100-80g")
    found = forecast(PlanInputs(large(), swallow, gpu), utilisation=0.4)
    own = next(memory for memory in found.worker_memory if memory.zero_stage == 2 and memory.checkpointing)
    trained = found.inputs.student.trained
    assert own.parts["weights"] == 2 * trained and own.parts["optimizer"] == 12 * trained / 4
    assert own.parts["teacher head"] == 151665 * 5120 * 2
    answer = 4 * 2048 * 5120 * 2
    assert own.parts["prefetch window"] == (4 + 1) * answer  # on the GPU already, and the one in use
    assert found.inputs.wire_bytes == {
        "hidden": 10240, "hidden_int8": 5124, "hidden_fp8": 5124, "topk": 64 * 6 + 8, "logits": 303330
    }  # fmt: skip
    assert {memory.zero_stage for memory in found.worker_memory} == {1, 2, 3}  # 0 is refused with bfloat16
    assert max(map(len, shown(found).splitlines())) <= 100


def test_a_cache_keeps_answers_off_the_gpu(swallow: Models, tmp_path: Path) -> None:
    config = large(f"cache.directory={tmp_path}")
    inputs = PlanInputs(config, swallow, hardware_named("h100-80g"))
    assert inputs.on_device_bytes == inputs.answer_bytes


def test_what_cannot_fit_is_said_with_a_remedy(swallow: Models) -> None:
    config = large("student.gradient_checkpointing=false", "teacher.shards=1")
    gpu = hardware_named("l4-24g")
    needed = min(
        forecast(PlanInputs(config, swallow, gpu), utilisation=0.4).worker_memory, key=lambda memory: memory.bytes
    ).bytes
    small = replace(gpu, memory_bytes=needed + 1)
    notes = forecast(PlanInputs(config, swallow, small), utilisation=0.4).notes
    worker = next(note for note in notes if note.startswith("a student worker needs"))
    assert "it cannot fit; it would fit with student.zero_stage: 2 and student.gradient_checkpointing: true" in worker
    small = replace(gpu, memory_bytes=10e9)
    notes = forecast(PlanInputs(config, swallow, small), utilisation=0.4).notes
    shards = next(note for note in notes if note.startswith("a teacher process needs"))
    assert "with teacher.shards: 1 and l4-24g has 9.3 GiB: it cannot fit; set teacher.shards: 4" in shards
    tiny = replace(small, memory_bytes=3e9)
    notes = forecast(PlanInputs(large(), swallow, tiny), utilisation=0.4).notes
    assert any("use more workers" in note for note in notes) and any("use more shards" in note for note in notes)


def test_waiting_and_wasted_replicas_are_said(swallow: Models) -> None:
    gpu = hardware_named("h100-80g")
    slow = forecast(PlanInputs(large("teacher.replicas=1"), swallow, gpu), utilisation=0.4)
    assert slow.times.bottleneck == "teacher"
    assert any(f"teacher.replicas: {slow.times.balanced_replicas} would hide it" in note for note in slow.notes)
    many = forecast(PlanInputs(large("teacher.replicas=90"), swallow, gpu), utilisation=0.4)
    assert any(note.startswith("90 teacher replicas, but") for note in many.notes)


@pytest.mark.parametrize(
    ("override", "note"),
    [
        ("data.pack=false", "every row is counted as full"),
        ("teacher.quantization={load_in_4bit: true}", "counted unquantised"),
        ("student.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}", "not modelled"),
        ("student.workers={min: 1, max: 2}", "this plan is for the fewest, 1"),
        ("student.workers=2", "collectives are not in the step time, but in the table of workers (0.3 GB/s assumed)"),
    ],
)
def test_what_makes_a_plan_less_certain_is_said(override: str, note: str) -> None:
    assert any(note in line for line in planned(quickstart(override)).notes)


def test_a_config_keeps_its_own_precision(swallow: Models) -> None:
    """transformers writes the dtype of what it builds into the config, and `teacher.dtype: auto` reads it there."""
    inputs = PlanInputs(large("teacher.dtype=auto"), swallow, CPU)
    assert inputs.teacher.parameters and inputs.teacher_activations() and inputs.teacher_bytes == 2


def test_a_flash_attention_need_not_be_installed(swallow: Models) -> None:
    import torch

    flash, plain = (trace(swallow.student, Pass(1, 32, torch.bfloat16, name)) for name in ("flash_attention_2", "sdpa"))
    assert flash == plain


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(quickstart().model_dump(mode="json")))
    return str(path)


def test_the_command_prints_json(config_file: str) -> None:
    result = run(config_file, "--gpu", "cpu", "--json", "--tokens", "4e9", "--price-per-gpu-hour", "0.1")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["whole"]["tokens"] == 4e9 and found["bottleneck"] == "student"
    assert "sizes" not in found["student"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100"], "--gpu: unknown hardware"),
        (["--utilisation", "1.5"], "--utilisation: .* above 0 and is at most 1"),
        (["--utilisation", "0"], "--utilisation"),
        (["--tokens", "0"], "--tokens: must be a number above 0"),
        (["--tokens", "nan"], "--tokens"),
        (["--price-per-gpu-hour", "-1"], "--price-per-gpu-hour"),
        (["device=cpu", "--gpu", "h100-80g"], "device: cpu contradicts --gpu h100-80g"),
        (["device=cuda", "--gpu", "cpu"], "device: cuda contradicts --gpu cpu"),
        (
            ["data.sequence_length=4096", "--gpu", "cpu"],
            "longer than the .* context of .* tokens; set it to at most 512",
        ),
        (["teacher.shards=3", "--gpu", "cpu"], "teacher.shards = 3 does not divide"),
    ],
)
def test_the_command_refuses(config_file: str, arguments: list[str], message: str) -> None:
    result = run(config_file, *arguments)
    assert result.exit_code != 0
    with pytest.raises(Exception, match=message):
        raise result.exception


def test_no_weights_are_needed(tmp_path: Path) -> None:
    source = Path(quickstart().teacher.model)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (bare / file.name).write_bytes(file.read_bytes())
    assert not list(bare.glob("*.safetensors"))
    config = build_config(quickstart().model_dump(mode="json"), [f"teacher.model={bare}"])
    assert planned(config).inputs.teacher == planned(quickstart()).inputs.teacher


def test_refusals_come_before_torch_is_loaded(config_file: str) -> None:
    code = (
        "import sys, taid_ray.cli.plan as c\n"
        f"try: c.plan(__import__('pathlib').Path({config_file!r}), gpu='x')\n"
        "except Exception as e: print(type(e).__name__, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == [ConfigError.__name__, "False"]
