"""Errors a user can act on. Each carries one message: what is wrong, what was found, what to do.

All of them cross process boundaries inside Ray, so each takes exactly one string and pickles.
"""


class TaidRayError(Exception):
    """Base of every error that taid-ray raises on purpose."""


class ConfigError(TaidRayError, ValueError):
    """A key of the configuration is unknown, malformed or contradicts another one."""


class DataError(TaidRayError, ValueError):
    """A dataset is missing, empty, lacks a column or has a row that cannot be used."""


class ModelError(TaidRayError, ValueError):
    """A model or tokenizer is missing, or teacher and student do not fit together."""


class TeacherError(TaidRayError, RuntimeError):
    """The teacher pool failed a check, or gave no answer before its deadline."""


class ClusterError(TaidRayError, RuntimeError):
    """The Ray cluster cannot hold what was asked for."""


class RunError(TaidRayError, RuntimeError):
    """A file in the directory of a run, a search or a cache is damaged, or cannot be written."""


class CheckpointError(TaidRayError, RuntimeError):
    """A checkpoint cannot be written, or none that was written can be read."""


class WorkerError(TaidRayError, RuntimeError):
    """The student workers failed too often in a row, or no trial of a search finished."""


class AttemptError(TaidRayError, RuntimeError):
    """A group of student workers cannot go on; another group can, from the last checkpoint."""


class MessageError(TaidRayError, ValueError):
    """Bytes from another process, or from the cache, are not the message that was sent."""


class NonFiniteLossError(TaidRayError, ArithmeticError):
    """The loss became NaN or infinite; the schedule's state was left untouched."""


def shortened(error: BaseException | str, width: int = 300) -> str:
    """Writes an error in one line of about `width` characters, cut behind a word, its type in front; or a text alone."""
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    line = " ".join(f"{kind}{error}".split())
    return line if len(line) <= width else f"{line[: width - 4].rsplit(' ', 1)[0]} ..."
