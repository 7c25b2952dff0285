"""The quickstart: the bundled teacher and stories, and the samples shown at its end."""

import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from taid_ray.config.models import StudentConfig
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.config.text import read_tree, set_key
from taid_ray.models.loading import load_causal_lm
from taid_ray.models.pair import run_tokenizer
from taid_ray.models.student_init import build_student

BUNDLE = Path(str(files("taid_ray"))) / "quickstart"
PROMPT = "Once upon a time"
NEW_TOKENS = 96


def quickstart_config(overrides: Sequence[str], out: str | None) -> DistillConfig:
    """The shipped configuration with the package's own files, in a new run directory."""
    tree = read_tree(BUNDLE.parent / "configs" / "quickstart.yaml")
    set_key(tree, "teacher.model", str(BUNDLE / "stories260k"))
    set_key(tree, "data.train", str(BUNDLE / "tinystories_train.jsonl"))
    set_key(tree, "data.valid", str(BUNDLE / "tinystories_valid.jsonl"))
    set_key(tree, "out", time.strftime("runs/quickstart-%Y%m%d-%H%M%S"))
    return build_config(tree, overrides, {} if out is None else {"out": out})


def show_samples(config: DistillConfig, console: Console) -> None:
    """Prints how the teacher, if there is one, the student before and the student after continue one prompt, greedily."""
    tokenizer = run_tokenizer(config)
    models = {"teacher": load_causal_lm(config.teacher, dtype="float32")} if config.teacher else {}
    models |= {
        "student before": build_student(config, None),
        "student after": load_causal_lm(StudentConfig(model=str(config.run_dir / "model")), dtype="float32"),
    }
    for name, model in models.items():
        console.print(f"\n[bold]{name}[/bold]", highlight=False)
        console.print(complete(model, tokenizer, PROMPT), markup=False, highlight=False)


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str) -> str:
    """`prompt` with the model's greedy continuation of NEW_TOKENS tokens."""
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.eval().generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
