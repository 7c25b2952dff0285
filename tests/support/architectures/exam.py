"""What taid-ray makes of one tiny model: the steps of a run, through the package's own functions, against `plain`.

Nothing here decides whether an architecture can be used. The package refuses it, in one sentence; or what the package
computes must be what the model itself computes.
"""

import json
from pathlib import Path
from typing import Any

import torch

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.data.batch import NO_LABEL, Batch, Row, collate
from taid_ray.distributed.world import World
from taid_ray.models.pair import check_models, model_configs
from taid_ray.models.self_test import tested_head
from taid_ray.models.student_init import build_student
from taid_ray.student.engine import Student
from taid_ray.student.engine_check import check_engine
from taid_ray.student.evaluate import evaluate_model
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.payload import TeacherOutput
from tests.support.architectures import plain
from tests.support.architectures.fields import VOCAB
from tests.support.architectures.report import Report
from tests.support.architectures.split import SplitTeacher
from tests.support.architectures.tiny import build, save, tiny_config

LENGTH = 96
"""Longest row, in tokens."""
CUTS = ([0, 1], [0, 3], [1, 2])
T, SFT_WEIGHT = 0.4, 0.25
RELATIVE = 1e-4
"""Largest relative difference of hidden states or gradients in float32."""
EVAL = {"float32": (1e-6, 2e-5), "bfloat16": (1e-3, 1e-2)}
"""Largest KL of a model to itself, and largest difference of its cross-entropy from `plain`'s, in nats per token."""
DTYPES = tuple(EVAL)
CPU = torch.device("cpu")


def examine(name: str, directory: Path, split: SplitTeacher | None = None) -> Report:
    """Builds a student and a teacher of this architecture in `directory`, and tries everything on them.

    split: the processes that try `teacher.shards: 2`; without them that is left out.
    """
    report, model_config = Report(name), tiny_config(name)
    for seed, role in enumerate(("student", "teacher")):
        save(build(model_config, seed), model_config, directory / role)
    (directory / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in plain.texts()))
    _open(report, directory)
    if report.accepted:
        with report.step("eval float32"):
            _evaluate(report, directory, "float32", ((False, 16384), (False, 64), (report.packing, 64)))
        with report.step("eval bfloat16"):
            _evaluate(report, directory, "bfloat16", ((False, 64),))
        with report.step("training float32"):
            _train(report, directory)
        for pack in (True, False)[not report.packing :]:
            with report.step(f"training bfloat16 pack {pack}"):
                _save(report, directory, pack)
                break
        if split:
            with report.step("split"):
                _split(report, directory, split)
    for layers in CUTS:
        with report.step(f"cut {layers}"):
            _cut(report, directory, layers)
    return report


def _config(directory: Path, pack: bool, dtype: str, student: dict[str, Any] | None = None) -> DistillConfig:
    """A run with the models and data of `directory`."""
    data = str(directory / "data.jsonl")
    return build_config(
        {
            "teacher": {"model": str(directory / "teacher"), "dtype": dtype, "mode": "local"},
            "student": (student or {"model": str(directory / "student")})
            | {"dtype": dtype, "zero_stage": 0 if dtype == "float32" else 1},
            "data": {"train": data, "valid": data, "sequence_length": LENGTH, "pack": pack},
            "loss": {"sft_weight": SFT_WEIGHT},
            "train": {"steps": 1, "batch_size": 4, "micro_batch_size": 4},
        }
    )


def _open(report: Report, directory: Path) -> None:
    """Checks and loads both models, as a run does. What is refused as a teacher, or as a student, counts as refused."""
    for pack in (True, False):
        opened = [_opens(report, directory, pack, dtype) for dtype in DTYPES]
        report.accepted = len(opened[0]) == 2
        report.packing = report.packing or (pack and report.accepted)
        if all(len(models) == 2 for models in opened):
            break
    refused = [m for key, m in report.refusals.items() if key.endswith("float32 pack True")]
    without_remedy = [message for message in refused if "data.pack: false" not in message]
    if report.accepted and without_remedy:
        report.wrong.append(f"packing is refused without the remedy data.pack: false: {without_remedy[0]}")


def _opens(report: Report, directory: Path, pack: bool, dtype: str) -> list[str]:
    """Lists which of both models can be used so."""
    config, opened = _config(directory, pack, dtype), []
    with report.step(f"check {dtype} pack {pack}"):
        check_models(config, *model_configs(config))
        with report.step(f"teacher {dtype} pack {pack}"):
            info = TeacherModel(config.teacher, VOCAB, CPU).info()
            if pack:
                info.require_packing()
            opened.append("teacher")
        with report.step(f"student {dtype} pack {pack}"):
            tested_head(build_student(config, None).eval(), "student.model", pack)
            opened.append("student")
    return opened


def _evaluate(report: Report, directory: Path, dtype: str, ways: tuple[tuple[bool, int], ...]) -> None:
    """Measures the student against itself, with rows and batches put together in several ways (pack, teacher.max_tokens)."""
    model, (largest_kl, largest_difference) = str(directory / "student"), EVAL[dtype]
    for pack, tokens in ways:
        keys = [f"teacher.dtype={dtype}", f"student.dtype={dtype}", f"data.sequence_length={LENGTH}"]
        keys += [f"teacher.max_tokens={tokens}", f"data.pack={str(pack).lower()}"]
        found = evaluate_model(model, model, str(directory / "data.jsonl"), keys, rouge=False)
        expected = plain.cross_entropy(directory / "student", dtype)  # second, for it fails where the model is refused
        way = f"eval against itself, {dtype}, pack {pack}, {tokens} tokens at once"
        report.expect(f"{way}: KL", abs(found.kl), largest_kl)
        for side in ("", "teacher_"):
            difference = abs(getattr(found, f"{side}cross_entropy") - expected)
            report.expect(f"{way}: {side}cross_entropy differs from the model's own", difference, largest_difference)


def _in_engine(config: DistillConfig) -> Student:
    """Builds the student, tests it, and puts it into its engine, as a worker does."""
    model = build_student(config, None).eval()
    head = tested_head(model, "student.model", config.data.pack)
    student = Student(config, model, VOCAB, World(), CPU)
    check_engine(student, len(head.weight))
    return student


def _batch(packed: bool) -> Batch:
    """Four documents in two rows, or in four."""
    parts = [ids[0].tolist() for ids in plain.documents(40)[:4]]
    return collate(
        [
            Row(
                input_ids=[token for part in row for token in part],
                position_ids=[position for part in row for position in range(len(part))],
                targets=[target for part in row for target in (*part[1:], NO_LABEL)],
            )
            for row in ([parts[:2], parts[2:]] if packed else [[part] for part in parts])
        ]
    )


def _train(report: Report, directory: Path) -> None:
    """Trains one step in the student's engine, compares its gradient with autograd's, and saves."""
    config, batch = _config(directory, report.packing, "float32"), _batch(report.packing)
    teacher = TeacherModel(config.teacher, VOCAB, CPU)
    student = _in_engine(config)
    student.teacher_head = teacher.head()
    answer = TeacherOutput("hidden", teacher.score(batch.inputs, batch.loss_positions, batch.labels))
    loss, _ = student.forward(batch, answer, T)
    student.backward(loss)
    found = {name: p.grad.clone() for name, p in student.trained.named_parameters() if p.grad is not None}
    rows = plain.documents(40)[:4]
    expected = plain.gradients(directory / "student", directory / "teacher", rows, T, SFT_WEIGHT)
    report.expect("gradients", plain.gradient_error(found, expected), RELATIVE)
    student.step(1e-3)
    _check_saved(report, student, directory / "saved")


def _save(report: Report, directory: Path, pack: bool) -> None:
    """Puts the student into its engine in bfloat16, and saves it."""
    config = _config(directory, pack, "bfloat16")
    student = _in_engine(config)
    _check_saved(report, student, directory / "saved in bfloat16")


@torch.no_grad()
def _check_saved(report: Report, student: Student, directory: Path) -> None:
    """Saves the student as a run does at its end, and compares bits of logits with those of the model that was trained."""
    student.save(student.gathered_state(), directory)
    trained = student.causal_lm.eval()
    saved = plain.load(directory, dtype="auto")
    ids = plain.documents(40)[1]
    ours, theirs = (model(input_ids=ids, use_cache=False).logits for model in (trained, saved))
    if not torch.equal(ours, theirs):
        report.wrong.append(f"{directory.name}: its logits differ by {plain.relative(theirs, ours):.1e} of the largest")


def _split(report: Report, directory: Path, split: SplitTeacher) -> None:
    """Compares the answer of a teacher in two shards with that of the whole one."""
    batch = _batch(packed=False)
    whole = TeacherModel(_config(directory, False, "float32").teacher, VOCAB, CPU)
    expected = whole.score(batch.inputs, batch.loss_positions, batch.labels)["hidden"]
    report.expect("split", plain.relative(split.hidden(directory / "teacher", batch), expected), RELATIVE)
    report.split = True


def _cut(report: Report, directory: Path, layers: list[int]) -> None:
    """Cuts a student out of the teacher: its weights must be the teacher's."""
    config = _config(directory, False, "float32", {"init": "cut", "layers": layers})
    check_models(config, *model_configs(config))
    student = build_student(config, None).eval()
    teacher = plain.load(directory / "teacher", dtype=torch.float32).state_dict()
    for name, tensor in student.state_dict().items():
        if not any(torch.equal(tensor, teacher[old]) for old in _old_names(name, layers) if old in teacher):
            report.wrong.append(f"cut {layers}: {name} is not the teacher's")
    tested_head(student, "student.model", False)
    report.cuts.append(layers)


def _old_names(name: str, layers: list[int]) -> list[str]:
    """Names that a tensor of a cut model may have in the whole one: as it is, or with one number put back."""
    parts, found = name.split("."), [name]
    for at, part in enumerate(parts):
        if part.isdigit() and int(part) < len(layers):
            found.append(".".join([*parts[:at], str(layers[int(part)]), *parts[at + 1 :]]))
    return found
