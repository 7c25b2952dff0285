import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.errors import RunError
from taid_ray.files import read_metrics
from taid_ray.report.card import result_rows, result_table, write_model_card, write_plots
from taid_ray.report.format import shown_name
from taid_ray.run.metrics import MetricLog, StepMetrics, perplexity

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


def metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step, epoch=0, t=0.4 + step / 100, momentum=0.0, loss=3.0 / step, kl=1.0 / step, entropy_pt=2.0 / step, sft=0.0,
        floor_active=False, lr=1e-3, grad_norm=0.5, tokens=100, tokens_per_s=50.0, step_s=2.0, teacher_wait_s=0.0,
        data_s=0.1, forward_s=0.4, loss_s=0.5, backward_s=0.8, optimizer_s=0.1, schedule_wait_s=0.0, teacher_compute_s=0.9,
        payload_bytes=6400, samples_seen=step * 4,
    )  # fmt: skip


def test_metrics_lines_are_complete_at_once_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, 0)
    for step in (1, 2):
        log.write(metrics(step))
        assert [line["step"] for line in read_metrics(path)] == list(range(1, step + 1))  # before the next step
    log.close()
    again = MetricLog(path, 2)
    again.write(metrics(3))
    again.close()
    lines = read_metrics(path)
    assert [line["t"] for line in lines] == [metrics(step).t for step in (1, 2, 3)]
    documented = "step epoch t momentum loss kl entropy_pt floor_active lr grad_norm tokens tokens_per_s step_s"
    times = "data_s teacher_wait_s forward_s loss_s backward_s optimizer_s schedule_wait_s teacher_compute_s"
    assert set(lines[0]) >= set(f"{documented} {times} payload_bytes samples_seen".split())


def test_a_full_disk_is_told_with_the_step(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl", 0)
    log.close()
    log._file = Path("/dev/full").open("w")  # noqa: SIM115  # the log closes it
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written after step 1: .*No space left"):
        log.write(metrics(1))
    log.close()  # whose own attempt to write the line must not hide the error


def test_metrics_that_do_not_reach_the_checkpoint_are_damaged(tmp_path: Path) -> None:
    MetricLog(tmp_path / "metrics.jsonl", 0).close()
    with pytest.raises(RunError, match="no line for step 1, and the newest checkpoint is of step 2"):
        MetricLog(tmp_path / "metrics.jsonl", 2)


@pytest.mark.parametrize("steps", [1, 5])
def test_plots_are_written_from_the_metrics(steps: int, tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl", 0)
    for step in range(1, steps + 1):
        log.write(metrics(step))
    log.close()
    for _ in range(2):  # a second time over the first
        write_plots(tmp_path)
    picture = tmp_path / "report" / "training.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    from matplotlib import pyplot as plt

    assert not plt.get_fignums()


def test_plots_show_every_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot as plt

    log = MetricLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        log.write(metrics(step))
    log.close()
    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    write_plots(tmp_path)
    monkeypatch.undo()
    drawn = {line.get_label(): list(line.get_ydata()) for axis in figures[0].axes for line in axis.get_lines()}
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for label, key in {
        "loss (cross-entropy form)": "loss",
        "entropy of the target": "entropy_pt",
        "KL(target || student)": "kl",
        "t": "t",
        "gradient norm": "grad_norm",
        "learning rate": "lr",
    }.items():
        assert drawn[label] == [line[key] for line in lines], label
    plt.close(figures[0])
