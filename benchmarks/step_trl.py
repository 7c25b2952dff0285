"""The same steps by TRL's GKDTrainer."""

import os
import time
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.step_case import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Case, Outcome, Watched, batches
from benchmarks.step_plain import make_resident, outcome_of


def trl_is_installed() -> bool:
    return find_spec("trl") is not None


def train_trl(case: Case) -> Outcome:
    """Takes the steps of the case with GKDTrainer. Needs the extra `bench`.

    `beta=0` is KL(teacher || student) in TRL's generalised JSD (`F.kl_div(student_log_probs, teacher_log_probs)`),
    `lmbda=0` trains on the data alone. Its temperature is one of sampling only; the loss takes the logits as they are.
    Everything else is TRL's default but for what all variants share: AdamW's settings, float32, no checkpointing of
    activations, no logging to disk, rows in order. The first loss is that of its log.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []
            self.losses: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            make_resident(trainer.model, trainer.teacher_model)
            self.process = Watched()
            self.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.mark()

        def on_log(self, *_: Any, **values: Any) -> None:
            self.losses += [values["logs"]["loss"]] if "loss" in values["logs"] else []

        def mark(self) -> None:
            self.times.append((time.perf_counter(), self.process.cpu_s()))

    rows = [ids for batch in batches(case) for ids in batch.inputs["input_ids"].tolist()]
    watch = Watch()
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(case.student),
        teacher_model=AutoModelForCausalLM.from_pretrained(case.teacher),
        args=GKDConfig(
            output_dir=str(case.directory / "trl"),
            beta=0.0,
            lmbda=0.0,
            temperature=1.0,
            seq_kd=False,
            max_steps=case.steps,
            per_device_train_batch_size=case.rows,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=AutoTokenizer.from_pretrained(case.student),
        callbacks=[watch],
    )
    trainer.train()
    return outcome_of(watch.process, watch.times, watch.losses[0])


def collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Whole rows, all of which carry loss (TRL leaves out the first label itself)."""
    ids = torch.tensor([item["input_ids"] for item in items])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
