"""The run directory before the run: whether it may be used, and the configuration left in it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from taid_ray.config import DistillConfig
from taid_ray.errors import ConfigError, TaidRayError
from taid_ray.metrics import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE


def with_absolute_paths(config: DistillConfig) -> DistillConfig:
    """Local files and directories by their absolute paths: workers on a cluster start in other directories."""

    def absolute(value: str | None) -> str | None:
        if not value or "{" in value:  # a chat template may be given as text
            return value
        path = Path(value).expanduser()
        return str(path.absolute()) if path.exists() else value

    data = {key: absolute(getattr(config.data, key)) for key in ("train", "valid", "chat_template")}
    return config.model_copy(
        update={
            "out": str(config.run_dir),
            "teacher": config.teacher.model_copy(update={"model": absolute(config.teacher.model)}),
            "student": config.student.model_copy(update={"model": absolute(config.student.model)}),
            "data": config.data.model_copy(update=data),
        }
    )


def check_run_dir_is_new(run_dir: Path) -> None:
    """Raises ConfigError if `run_dir` holds another run, or anything else, or if it cannot be made."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"out: {run_dir} is a file; name a directory that does not exist yet")
    if run_dir.exists() and any(run_dir.iterdir()):
        held = "other files"
        if (run_dir / CONFIG_FILE).exists():
            finished = (run_dir / SUMMARY_FILE).exists()
            held = "another run" if finished else "another run, which did not finish and cannot be resumed yet"
        raise ConfigError(f"out: {run_dir} already holds {held}; choose another directory with --out, or remove it")
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".taid-probe-", dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"out: {run_dir} cannot be made, because nothing can be written to {existing} ({error.strerror}); "
            "choose another directory with --out"
        ) from None


def write_config(config: DistillConfig) -> None:
    """Makes the run directory and leaves the resolved configuration in it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (config.run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")


@contextmanager
def run_directory(config: DistillConfig) -> Iterator[None]:
    """Makes the run directory; removes it again if the run ends before its first step by what a user can put right."""
    write_config(config)
    try:
        yield
    except (TaidRayError, KeyboardInterrupt):
        metrics = config.run_dir / METRICS_FILE
        if not metrics.exists() or not metrics.stat().st_size:
            shutil.rmtree(config.run_dir, ignore_errors=True)
        raise
