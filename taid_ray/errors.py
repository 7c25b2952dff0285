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


class CheckpointError(TaidRayError, RuntimeError):
    """A checkpoint cannot be written, or none that was written can be read."""


class AttemptError(TaidRayError, RuntimeError):
    """This group of student workers cannot go on; another one can, from the last checkpoint."""


class NonFiniteLossError(TaidRayError, ArithmeticError):
    """The loss became NaN or infinite; the schedule's state was left untouched."""
