"""RUN/report.html and its pictures, of a run that is finished, was interrupted or still goes on."""

from pathlib import Path
from typing import Any

import yaml

from taid_ray.errors import RunError
from taid_ray.files import replace_text
from taid_ray.report.format import shown_amount, shown_bytes, shown_name, shown_seconds
from taid_ray.report.history import History, read_history
from taid_ray.report.page import details_part, notes_part, page, picture_part, table_part
from taid_ray.report.run_notes import run_notes
from taid_ray.report.run_plots import PHASE_COLOURS, REST, loss_curves, optimizer, step_time, t_curve, throughput
from taid_ray.report.run_sources import latest_steps, source_curves, source_heading, source_rows
from taid_ray.run.layout import REPORT_FILE
from taid_ray.run.metrics import perplexity

PLOTS = {
    "t.png": (t_curve, "How t moved"),
    "loss.png": (loss_curves, "Loss"),
    "sources.png": (source_curves, "Loss of each source"),
    "step_time.png": (step_time, "Where the time of a step went"),
    "throughput.png": (throughput, "Throughput"),
    "optimizer.png": (optimizer, "Gradient norm and learning rate"),
}
BAR = 40  # characters of a whole step


def write_run_report(path: Path) -> list[str]:
    """Writes RUN/report/*.png and RUN/report.html, over those of an earlier call. Returns the page's notes.

    Raises ConfigError if this is no run directory or has no step yet, RunError if a file of it is damaged or cannot be
    written.
    """
    history = read_history(path)
    try:
        (path / "report").mkdir(exist_ok=True)
        parts = [
            notes_part(run_notes(history)),
            table_part("Key figures", (), key_figures(history)),
            *_validation_part(history),
            *([table_part("Sources", source_heading(history), source_rows(history))] if history.sources else []),
            *(picture_part(title, draw(history), path / "report" / name) for name, draw, title in _plots(history)),
            table_part(
                "Where the time of all steps went", ("phase", "", "seconds per step", "share"), time_rows(history)
            ),
            _attempts_part(history),
            details_part("config.yaml", _config_text(history)),
        ]
        replace_text(path / REPORT_FILE, page(f"Run {history.config.name}", _summary(history), parts))
    except OSError as error:
        raise RunError(f"{path}: the report cannot be written there ({error}); make room, or copy the run") from error
    return run_notes(history)


def key_figures(history: History) -> list[tuple[str, str]]:
    """Names and values of the table of key figures, as text."""
    config, tokens, seconds = history.config, history["tokens"].sum(), history["step_s"].sum()
    student, summary = config.student, history.summary or {}
    origin = {"cut": f"layers {student.layers} of the teacher", "scratch": "new weights"}
    rows = [
        ("run", history.id),
        ("teacher", _teacher(history)),
        ("student", f"{origin.get(student.init, shown_name(str(student.model)))}{_parameters(summary, 'after')}"),
        ("loss", _loss_name(history)),
        ("optimizer steps", _progress(history)),
        ("data read", _data_read(history)),
        ("loss at the end", _last_loss(history)),
        ("time of all steps", shown_seconds(float(seconds))),
        ("throughput", f"{tokens / max(seconds, 1e-9):,.0f} loss tokens per second"),
        *_from_teacher(history),
        ("workers started", f"{len(history.attempts)} times" if len(history.attempts) != 1 else "once"),
    ]
    if config.loss.is_taid:
        rows.insert(6, ("t in the last step", f"{history['t'][-1]:.4f}"))
    if "wall_s" in summary:
        rows.append(("time with validation and saving", shown_seconds(summary["wall_s"])))
    if dropped := summary.get("dropped_documents"):
        rows.append(("documents dropped", f"{dropped:,} of {summary['documents_read']:,}"))
    return rows + _images(history)


def _images(history: History) -> list[tuple[str, str]]:
    """Key figures of the images of a run; none without any."""
    rows, summary = [], history.summary or {}
    if "images" in summary:
        sent = shown_bytes(summary["image_bytes"])
        rows.append(("images", f"{summary['images']:,}, of which {sent} were sent to the teacher"))
    if seen := [line["seeing"] for line in history.validations if "seeing" in line]:
        rows.append(("what grey images change", f"{seen[0]:.2g} nats of the student at first, {seen[-1]:.2g} at last"))
    return rows


def _teacher(history: History) -> str:
    config = history.config
    if config.teacher is None:
        return "none"
    asked = "" if config.learns_from_teacher else ", in validations only"
    size = _parameters(history.summary or {}, "teacher")
    return f"{shown_name(config.teacher.model)}{size}, payload {config.teacher.payload}{asked}"


def _from_teacher(history: History) -> list[tuple[str, str]]:
    """Key figures of what training got from the teacher; none with the loss `sft`."""
    if not history.config.learns_from_teacher:
        return []
    share = history["teacher_wait_s"].sum() / max(history["step_s"].sum(), 1e-9)
    received = shown_amount(float(history["payload_bytes"].sum()), float(history["tokens"].sum()))
    return [("wait for the teacher", f"{share:.1%} of that time"), ("received from the teacher", received)]


def time_rows(history: History) -> list[tuple[str, str, str, str]]:
    """The phases of a step, the longest first: name, bar, mean seconds and share of the step."""
    step = float(history["step_s"].mean())
    seconds = {PHASE_COLOURS[key][0]: float(history[key].mean()) for key in history.phases}
    seconds[REST[0]] = max(0.0, step - sum(seconds.values()))
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    shares = [value / max(step, 1e-9) for _, value in ordered]
    rows = [
        (name, "█" * round(BAR * share), f"{value:.4f}", f"{share:.1%}")
        for (name, value), share in zip(ordered, shares, strict=True)
    ]
    return [*rows, ("whole step", "", f"{step:.4f}", "")]


def validation_rows(history: History) -> list[tuple[str, ...]]:
    """Rows for the teacher and the student at first, at its lowest KL and at last; nats per token. Needs one validation.

    Without a teacher the best is the one with the lowest cross-entropy, and there is no column for the KL.
    """
    lines, compared = history.validations, history.config.teacher is not None
    figure, name_of_best = ("kl", "KL") if compared else ("cross_entropy", "cross-entropy")
    best = min(lines, key=lambda line: line[figure])
    named = {"student, first": lines[0], f"student, lowest {name_of_best}": best, "student, last": lines[-1]}
    rows: list[tuple[str, ...]] = []
    if compared:
        teacher = lines[0]["teacher_cross_entropy"]
        rows.append(("teacher", "", f"{teacher:.4f}", f"{perplexity(teacher):.2f}", "-"))
    for name, line in named.items():
        loss, kl = line["cross_entropy"], (f"{line['kl']:.4f}",) if compared else ()
        rows.append((name, f"{line['step']:,}", f"{loss:.4f}", f"{perplexity(loss):.2f}", *kl))
    return rows


def _plots(history: History) -> list[tuple[str, Any, str]]:
    """File name, drawing function and title of each picture; without t where the loss knows none, without sources if there is
    only one."""
    left_out = set() if history.config.loss.is_taid else {"t.png"}
    left_out |= set() if history.sources else {"sources.png"}
    return [(name, draw, title) for name, (draw, title) in PLOTS.items() if name not in left_out]


def _summary(history: History) -> str:
    state = "Finished" if history.summary is not None else "Not finished"
    found = f"{state}: {_progress(history)} steps."
    if history.validations:
        first, last = history.validations[0], history.validations[-1]
        key, figure = ("kl", "KL to the teacher") if history.config.teacher else ("cross_entropy", "Cross-entropy")
        found += f" {figure} on the validation rows: {first[key]:.4f} after step {first['step']:,}"
        found += f", {last[key]:.4f} after step {last['step']:,}." if last is not first else "."
    return found


def _progress(history: History) -> str:
    return f"{history.steps:,} of {history.total_steps:,}" if history.total_steps else f"{history.steps:,}"


def _loss_name(history: History) -> str:
    loss, schedule = history.config.loss, history.config.schedule
    name = loss.shown
    if loss.is_taid:
        name += f", schedule {schedule.mode}, t {schedule.t_start:g} to {schedule.t_end:g}"
        name += f", alpha {schedule.alpha:g}" if schedule.mode not in ("linear", "constant") else ""
        name += f", beta {schedule.beta:g}" if schedule.mode in ("adaptive", "normalised") else ""
    return f"{name}; {loss.sft_weight:g} of it cross-entropy on the labels" if loss.sft_weight else name


def _data_read(history: History) -> str:
    samples, tokens, epoch = history["samples_seen"][-1], history["tokens"].sum(), history["epoch"][-1] + 1
    return f"{samples:,.0f} samples, {tokens:,.0f} loss tokens, now in pass {epoch:.0f} over the data"


def _parameters(summary: dict[str, Any], key: str) -> str:
    known = summary.get(key, {}).get("parameters")  # of a teacher that is only a file there may be 0
    return f", {known:,} parameters" if known else ""


def _last_loss(history: History) -> str:
    count = latest_steps(history)
    parts = f", of it divergence {history['kl'][-count:].mean():.4f}" if history.config.learns_from_teacher else ""
    over = f", mean of the last {count} steps" if count > 1 else ""
    return f"{history['loss'][-count:].mean():.4f} nats per token{parts}{over}"


def _validation_part(history: History) -> list[str]:
    if not history.validations:
        return []
    heading = (
        "",
        "after step",
        "cross-entropy",
        "perplexity",
        *(["KL to the teacher"] if history.config.teacher else []),
    )
    return [table_part("Validation, nats per token", heading, validation_rows(history))]


def _attempts_part(history: History) -> str:
    rows = [
        (
            str(number),
            str(attempt["began"]).replace("T", " ").replace("+00:00", " UTC"),
            str(attempt["workers"]),
            str(attempt["host"]),
        )
        for number, attempt in enumerate(history.attempts, start=1)
    ]
    return table_part("Starts of the workers", ("start", "when", "workers", "driver's host"), rows)


def _config_text(history: History) -> str:
    return yaml.safe_dump(history.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
