"""RUN/log.jsonl: everything a run tells its user, one JSON object per line, for log collectors and for later."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Protocol

from taid_ray.errors import TaidRayError

LOG_FILE = "log.jsonl"
DRIVER, STUDENT = "driver", "student"
PACKAGE = "taid_ray"


class JsonLines(logging.Formatter):
    """Formats a record as JSON: time (UTC, ISO 8601), level, run, step, role, message, and traceback where there is one."""

    def __init__(self, run: str):
        super().__init__()
        self._run = run

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": self._run,
            "step": getattr(record, "step", 0),
            "role": getattr(record, "role", DRIVER),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class Records(MemoryHandler):
    """Keeps what is said before the run has a directory, and hands it on from then on."""

    def __init__(self) -> None:
        super().__init__(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)

    def add(self, message: str, role: str, step: int, level: int, error: BaseException | None = None) -> None:
        """Adds a message. step: the last one that was made, 0 before the first."""
        trace = (type(error), error, error.__traceback__) if error is not None else None
        fields = {"levelno": level, "levelname": logging.getLevelName(level), "exc_info": trace}
        self.handle(logging.makeLogRecord({"name": PACKAGE, "msg": message, "role": role, "step": step, **fields}))

    def hand_to(self, handler: logging.Handler | None) -> None:
        """Passes the records on to a handler, first those that were kept; None: keeps them again."""
        self.setTarget(handler)
        self.flushLevel = logging.CRITICAL + 1 if handler is None else logging.NOTSET
        self.flush()


class Speaker(Protocol):
    """Interface of the terminal (driver.progress.ProgressView) that the log uses."""

    records: Records
    made: int
    """Last step that was made."""

    def say(self, message: str, role: str = DRIVER, level: int = logging.INFO) -> None: ...


class _Warnings(logging.Handler):
    """Shows warnings of the package's own loggers on the terminal, and thereby in the log."""

    def __init__(self, speaker: Speaker):
        super().__init__(logging.WARNING)
        self._speaker = speaker

    def emit(self, record: logging.LogRecord) -> None:
        self._speaker.say(f"warning: {record.getMessage()}", DRIVER, record.levelno)


@contextmanager
def run_logging(directory: Path, run: str, speaker: Speaker) -> Iterator[None]:
    """Appends to directory/log.jsonl what `speaker` says and has said, warnings, and the error that ends the run."""
    path = directory / LOG_FILE
    _cut_torn_line(path)
    handler, warnings = logging.FileHandler(path, encoding="utf-8"), _Warnings(speaker)
    handler.setFormatter(JsonLines(run))
    speaker.records.hand_to(handler)
    logging.getLogger(PACKAGE).addHandler(warnings)
    try:
        yield
    except BaseException as error:
        _add_end(speaker, error)
        raise
    finally:
        logging.getLogger(PACKAGE).removeHandler(warnings)
        speaker.records.hand_to(None)
        handler.close()


def _add_end(speaker: Speaker, error: BaseException) -> None:
    add, step = speaker.records.add, speaker.made
    if isinstance(error, TaidRayError):
        add(f"error: {error}", DRIVER, step, logging.ERROR)
    elif isinstance(error, Exception):
        add(f"error: {type(error).__name__}: {error}", DRIVER, step, logging.ERROR, error)
    else:  # Ctrl-C or SIGTERM
        add("interrupted", DRIVER, step, logging.WARNING)


def _cut_torn_line(path: Path) -> None:
    """Removes the beginning of a line that a killed driver left, so that every line is whole."""
    whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if whole[2]:
        os.truncate(path, len(whole[0]) + len(whole[1]))
