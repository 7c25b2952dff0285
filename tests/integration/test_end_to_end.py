"""Whole runs through the public API: the bundled model, real instruction data, and a real 32,000-token vocabulary."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from taid_ray import RunResult, build_config, distill
from tests.support.chat_templates import LLAMA3
from tests.support.chats import chat_tokenizer
from tests.support.paths import BUNDLE, ROOT, SHARED

METRIC_KEYS = {
    "step", "epoch", "t", "momentum", "loss", "kl", "entropy_pt", "sft", "floor_active", "lr", "grad_norm", "tokens",
    "tokens_per_s", "step_s", "teacher_wait_s", "data_s", "forward_s", "loss_s", "backward_s", "optimizer_s",
    "schedule_wait_s", "teacher_compute_s", "payload_bytes", "samples_seen", "temperature",
}  # fmt: skip
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the development data in ../shared")


def check_run(result: RunResult, steps: int) -> list[dict[str, Any]]:
    """What every finished run has left behind."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held = {path.name for path in result.path.iterdir()}
    figures = {"metrics.jsonl", "validation.jsonl", "summary.json", "tensorboard"}
    written = figures | {"config.yaml", "run.json", "log.jsonl", "model", "report.html", "report"}
    assert held - {"checkpoints"} == written
    validations = [json.loads(line) for line in (result.path / "validation.jsonl").read_text().splitlines()]
    assert validations == result.summary["validations"] and len(validations) >= 2
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(set(line) == METRIC_KEYS for line in lines)
    assert all(line["loss"] == pytest.approx(line["kl"] + line["entropy_pt"]) for line in lines)
    assert json.loads((result.path / "summary.json").read_text()) == result.summary
    assert result.summary["steps"] == steps
    assert result.summary["tokens"] == sum(line["tokens"] for line in lines)
    assert (result.path / "report" / "loss.png").stat().st_size > 10_000
    assert (result.model / "README.md").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(result.model), AutoTokenizer.from_pretrained(result.model)
    logits = model(**tokenizer("Once upon a time", return_tensors="pt")).logits
    assert logits.isfinite().all() and logits.shape[-1] >= len(tokenizer.get_vocab())
    return lines


@pytest.mark.timeout(900)
def test_the_bundled_model_learns(ray_cluster: str, tmp_path: Path) -> None:
    """Two workers, a tensor-parallel teacher, ZeRO-3, validation on the way; the saved model measures as reported."""
    from taid_ray.student.evaluate import evaluate_model

    config = build_config(
        {
            "name": "bundled",
            "out": str(tmp_path / "run"),
            "teacher": {"model": str(BUNDLE / "stories260k"), "shards": 2, "timeout_s": 120},
            "student": {"init": "cut", "layers": [0, 4], "dtype": "float32", "workers": 2, "zero_stage": 3},
            "data": {
                "train": str(BUNDLE / "tinystories_train.jsonl"),
                "valid": str(BUNDLE / "tinystories_valid.jsonl"),
                "valid_documents": 10,
                "sequence_length": 128,
                "block_documents": 64,
            },
            "train": {"steps": 20, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 2e-3, "eval_every": 10},
        }
    )
    result = distill(config)
    check_run(result, 20)
    check_plan_from(result)
    before, after = result.summary["before"], result.summary["after"]
    assert before["cross_entropy"] > 6 and after["cross_entropy"] < 4.5
    assert after["kl"] < before["kl"] - 1.5
    assert [found["step"] for found in result.summary["validations"]] == [0, 10, 20]
    card = (result.model / "README.md").read_text()
    for expected in ("stories260k", "tinystories_train.jsonl", "adaptive, t 0.4 to 1.0", f"{after['kl']:.4f}"):
        assert expected in card
    assert str(tmp_path) not in card and str(ROOT) not in card

    measured = evaluate_model(
        str(result.model),
        str(BUNDLE / "stories260k"),
        str(BUNDLE / "tinystories_valid.jsonl"),
        ["data.valid_documents=10", "data.sequence_length=128"],
        rouge=False,
    )
    assert measured.cross_entropy == pytest.approx(after["cross_entropy"], abs=1e-5)
    assert measured.kl == pytest.approx(after["kl"], abs=1e-5)
    nothing_left_behind("bundled")


def check_plan_from(result: RunResult) -> None:
    """`taid-ray plan --from` finds its way in the directory of a real run, and what it reads there makes up the steps."""
    from taid_ray.plan.from_run import run_figures
    from taid_ray.plan.hardware import hardware_named
    from taid_ray.plan.inputs import PlanInputs, read_models
    from taid_ray.plan.rates import assumed_rates
    from taid_ray.report.history import read_history

    history = read_history(result.path)
    inputs = PlanInputs(history.config, read_models(history.config), hardware_named("cpu"))
    found = run_figures(history, inputs)
    assert (found.inputs.workers, found.steps) == (2, 13)  # not the first 3, the last 2, fastest and slowest
    assert all(found.rates[name] > 0 for name in ("teacher_s", "loss_s", "data_s"))
    replayed_s = found.replayed_s(assumed_rates(inputs, 0.4))
    assert 0.1 < replayed_s / found.step_s < 2  # what a busy machine's steps wait for is not in it


def nothing_left_behind(name: str) -> None:
    """No Serve application, actor or placement group of the run is alive."""
    from ray import serve
    from ray.util.state import list_actors, list_placement_groups

    assert not [app for app in serve.status().applications if name in app]
    alive = [a for a in list_actors() if a.state in ("ALIVE", "RESTARTING", "PENDING_CREATION")]
    assert not [a for a in alive if name in (a.name or "") or a.class_name in ("SchedulerActor", "RayTrainWorker")]
    assert not [g for g in list_placement_groups() if g.state == "CREATED"]


def random_model(path: Path, tokenizer: Path, rows: int, hidden: int, layers: int, seed: int) -> str:
    """A small Qwen2 with random weights and a real tokenizer; a Llama where that is one of Llama."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    qwen, llama = (Qwen2ForCausalLM, Qwen2Config), (LlamaForCausalLM, LlamaConfig)
    model_class, config_class = llama if "llama" in tokenizer.name else qwen
    model = model_class(config_class(vocab_size=rows, tie_word_embeddings=True, **shape, **heads))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return str(path)


@pytest.mark.more
@pytest.mark.timeout(900)
def test_a_base_student_stops_where_chats_end(ray_cluster: str, tmp_path: Path) -> None:
    """Its own EOS is another token than the one that ends an answer; a template that asks for the date gets the run's."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = chat_tokenizer(LLAMA3, eos="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = len(tokenizer)
    models = [
        random_model(tmp_path / name, tmp_path / "tokenizer", rows, 32, 2, seed=0) for name in ("teacher", "base")
    ]
    messages = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    (tmp_path / "d.jsonl").write_text((json.dumps({"conversations": messages}) + "\n") * 8)
    data = {"train": str(tmp_path / "d.jsonl"), "format": "chat", "sequence_length": 64, "valid_documents": 2}
    config = build_config(
        {
            "name": "chats",
            "out": str(tmp_path / "run"),
            "teacher": {"model": models[0], "mode": "local"},
            "student": {"model": models[1], "dtype": "float32"},
            "data": data,
            "train": {"steps": 2, "batch_size": 2, "micro_batch_size": 2},
        }
    )
    result = distill(config)
    ids = AutoTokenizer.from_pretrained(result.model).convert_tokens_to_ids(["<|eot|>"])
    stops = GenerationConfig.from_pretrained(result.model).eos_token_id
    assert ids[0] in ([stops] if isinstance(stops, int) else stops)
    assert "stops generating at <|eot|> too" in (result.path / "log.jsonl").read_text()
    assert yaml.safe_load((result.path / "config.yaml").read_text())["data"]["date"] == date.today().isoformat()


@needs_shared
@pytest.mark.more
@pytest.mark.timeout(900)
def test_instructions_with_a_padded_152k_vocabulary(ray_cluster: str, tmp_path: Path) -> None:
    """Real instruction rows; 152,064 teacher rows, 151,936 student rows and 151,646 real ids; labels mixed in."""
    tokenizer = SHARED / "tokenizers" / "qwen1.5"
    config = build_config(
        {
            "name": "dolly",
            "out": str(tmp_path / "run"),
            "teacher": {
                "model": random_model(tmp_path / "teacher", tokenizer, 152_064, 32, 2, seed=0),
                "timeout_s": 120,
            },
            "student": {
                "model": random_model(tmp_path / "student", tokenizer, 151_936, 16, 1, seed=1),
                "dtype": "float32",
                "zero_stage": 1,
            },
            "data": {
                "train": str(SHARED / "instruct" / "dolly_train_clean.jsonl"),
                "format": "prompt_response",
                "prompt_columns": ["instruction", "input"],
                "response_column": "output",
                "sequence_length": 128,
                "overlong": "drop",
                "valid_documents": 16,
                "block_documents": 64,
            },
            "loss": {"sft_weight": 0.2, "memory_mib": 1},
            "train": {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2},
        }
    )
    result = distill(config)
    lines = check_run(result, 3)
    assert 0 < result.summary["dropped_teacher_mass"] < 0.01
    assert all(line["sft"] > 0 for line in lines)
    assert all(0 < line["tokens"] < 4 * 128 * 0.9 for line in lines)  # responses only, not prompts
    assert lines[0]["payload_bytes"] == lines[0]["tokens"] * 32 * 4  # hidden states, at loss positions only


@needs_shared
@pytest.mark.more
@pytest.mark.timeout(900)
def test_streamed_text_with_a_32k_vocabulary_and_lora(ray_cluster: str, tmp_path: Path) -> None:
    tokenizer = SHARED / "tokenizers" / "tinyllama"
    config = build_config(
        {
            "name": "wikitext",
            "out": str(tmp_path / "run"),
            "teacher": {"model": random_model(tmp_path / "teacher", tokenizer, 32_064, 32, 2, seed=0), "mode": "local"},
            "student": {
                "model": random_model(tmp_path / "student", tokenizer, 32_000, 16, 1, seed=1),
                "dtype": "float32",
                "lora": {"rank": 4},
            },
            "data": {
                "train": str(SHARED / "text" / "wikitext2_train.jsonl"),
                "valid": str(SHARED / "text" / "wikitext2_valid.txt"),
                "valid_documents": 8,
                "sequence_length": 128,
                "streaming": True,
                "block_documents": 8,
            },
            "loss": {"name": "skew_forward_kl", "weight": 0.2},
            "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2},
        }
    )
    result = distill(config)
    lines = check_run(result, 4)
    assert {line["t"] for line in lines} == {1.0}  # losses other than TAID compare with the teacher itself
    assert result.summary["after"]["kl"] != result.summary["before"]["kl"]
