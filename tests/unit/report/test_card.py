import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.report.card import result_rows, result_table, write_model_card
from taid_ray.report.format import shown_name
from taid_ray.run.metrics import perplexity

SUMMARY: dict[str, Any] = {
    "steps": 250,
    "t": 0.9952,
    "tokens": 1_023_750,
    "teacher": {"cross_entropy": 1.6, "parameters": 262_080},
    "before": {"cross_entropy": 6.5523, "kl": 4.9, "parameters": 136_512},
    "after": {"cross_entropy": 2.25, "kl": 0.71234, "parameters": 136_512},
}


def config(directory: Path, **changes: Any) -> DistillConfig:
    tree: dict[str, Any] = {
        "name": "story-teller",
        "out": str(directory / "run"),
        "teacher": {"model": str(directory / "big-teacher")},
        "student": {"init": "cut", "layers": [0, 4]},
        "data": {"train": str(directory / "stories.jsonl"), "sequence_length": 256},
        "schedule": {"t_start": 0.25, "alpha": 0.003, "signal": "kl"},
        "train": {"steps": 250, "batch_size": 16, "learning_rate": 2e-3},
    }
    return build_config(tree | changes)


def card(directory: Path, **changes: Any) -> str:
    (directory / "run" / "model").mkdir(parents=True, exist_ok=True)
    write_model_card(directory / "run", config(directory, **changes), SUMMARY)
    return (directory / "run" / "model" / "README.md").read_text(encoding="utf-8")


def test_card_names_teacher_data_schedule_and_results(tmp_path: Path) -> None:
    text = card(tmp_path)
    for expected in (
        "# story-teller",
        "| teacher | `big-teacher` |",
        "| student before | layers [0, 4] of the teacher |",
        "| data | `stories.jsonl` (text, 256 tokens per row) |",
        "| loss | taid |",
        "adaptive, t 0.25 to 1.0 (0.995 in the last step), alpha 0.003, beta 0.99, signal kl",
        "250 steps of 16 rows, 1,023,750 loss tokens, peak learning rate 0.002",
        "| student after | 2.2500 | 9.49 | 0.7123 | 136,512 |",
        "| student before | 6.5523 | 700.85 | 4.9000 | 136,512 |",
        "| teacher | 1.6000 | 4.95 | - | 262,080 |",
    ):
        assert expected in text, (expected, text)
    assert text.startswith("---\n") and "tags: [distillation, taid]" in text.split("---")[1]


def test_card_of_a_run_without_a_teacher(tmp_path: Path) -> None:
    figures = {"cross_entropy": 2.25, "parameters": 136_512}
    summary = {"steps": 250, "tokens": 1_023_750, "before": figures | {"cross_entropy": 6.5523}, "after": figures}
    alone = config(tmp_path, teacher=None, student={"model": "org/student"}, loss={"name": "sft"})
    (tmp_path / "run" / "model").mkdir(parents=True)
    write_model_card(tmp_path / "run", alone, summary)
    text = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    for expected in (
        "tags: [sft]",
        "supervised fine-tuning",
        "| teacher | none |",
        "| loss | cross-entropy on the labels |",
        "|  | cross-entropy | perplexity | parameters |",
        "| student after | 2.2500 | 9.49 | 136,512 |",
        "The licences of the student it started from and of the data apply.",
    ):
        assert expected in text, (expected, text)
    assert "KL" not in text and "distil" not in text
    assert [row[0] for row in result_rows(summary)] == ["student before", "student after"]


def test_card_says_that_a_loss_is_wrong_on_purpose(tmp_path: Path) -> None:
    text = card(tmp_path, loss={"name": "ctkd", "published": True})
    assert (
        "| loss | ctkd (temperature 15.6212, times its square, with the faults of TAID's published code, for comparison"
        in text
    )
    assert "published" not in card(tmp_path, loss={"name": "ctkd"})


def test_card_has_no_local_path(tmp_path: Path) -> None:
    """Neither of what exists nor of what existed only on the machine of the run."""
    (tmp_path / "big-teacher").mkdir()
    local = {"student": {"init": "pretrained", "model": str(tmp_path / "small" / "student")}}
    for changes in ({}, local, {"data": {"train": str(tmp_path / "d.json"), "valid": str(tmp_path / "v.json")}}):
        text = card(tmp_path, **changes)
        assert str(tmp_path) not in text and str(tmp_path.parent) not in text and "`/" not in text
    assert "`student`" in card(tmp_path, **local)


def test_card_keeps_hub_names(tmp_path: Path) -> None:
    text = card(
        tmp_path,
        teacher={"model": "Qwen/Qwen2.5-32B-Instruct"},
        student={"model": "Qwen/Qwen2.5-1.5B-Instruct"},
        data={"train": "databricks/databricks-dolly-15k", "format": "chat"},
    )
    assert "`Qwen/Qwen2.5-32B-Instruct`" in text and "`Qwen/Qwen2.5-1.5B-Instruct`" in text
    assert "`databricks/databricks-dolly-15k` (chat, 2048 tokens per row)" in text


def test_card_of_another_loss_does_not_claim_taid(tmp_path: Path) -> None:
    text = card(tmp_path, loss={"name": "reverse_kl", "sft_weight": 0.25})
    assert "| loss | 0.75 x reverse_kl + 0.25 x cross-entropy on the labels |" in text
    assert "TAID" not in text and "tags: [distillation]" in text
    assert "adaptive" not in text and "t = 1" in text


def test_shown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shown_name("a/b") == "b"
    assert shown_name("org/model") == "org/model"
    assert shown_name("/nowhere/model") == "model"


def test_table() -> None:
    assert result_rows(SUMMARY)[0] == ("teacher", "1.6000", "4.95", "-", "262,080")
    console = Console(width=120)
    with console.capture() as captured:
        console.print(result_table(SUMMARY))
    lines = [line for line in captured.get().splitlines() if any(c.isdigit() for c in line)]
    assert [line.split("│")[1].strip() for line in lines] == ["teacher", "student before", "student after"]
    cells = [cell.strip() for cell in lines[2].split("│")[1:-1]]
    assert cells == ["student after", "2.2500", "9.49", "0.7123", "136,512"]


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_table_cuts_no_figure(width: int) -> None:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(result_table(SUMMARY))
    rows = [line.split("│")[1:-1] for line in captured.get().splitlines() if "│" in line]
    columns = ["".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)]
    for column, cells in zip(columns, zip(*result_rows(SUMMARY), strict=True), strict=True):
        assert column == "".join(cells).replace(" ", "")


def test_perplexity_never_overflows() -> None:
    assert perplexity(0.0) == 1 and perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf
