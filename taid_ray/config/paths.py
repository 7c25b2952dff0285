"""Paths in a configuration made absolute, because workers on a cluster start in other directories."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from taid_ray.config.schema import DistillConfig


def absolute_storage(value: str | None) -> str | None:
    """Makes the path of a directory absolute; leaves a URI as it is."""
    return value if value is None or "://" in value else str(Path(value).expanduser().absolute())


def with_absolute_paths(config: DistillConfig) -> DistillConfig:
    """Makes the paths of local files and directories absolute: workers on a cluster start in other directories."""

    def absolute(value: str | None) -> str | None:
        if not value or "{" in value:  # a chat template may be given as text
            return value
        with suppress(OSError, RuntimeError):  # a name too long for a file, or no such home: its reader says so
            path = Path(value).expanduser()
            return str(path.absolute()) if path.exists() else value
        return value

    data = {key: absolute(getattr(config.data, key)) for key in ("train", "valid", "chat_template")}
    data["store"] = absolute_storage(config.data.store)
    return config.model_copy(
        update={
            "out": str(config.run_dir),
            "teacher": config.teacher.model_copy(
                update={"model": absolute(config.teacher.model), "outputs": absolute_storage(config.teacher.outputs)}
            ),
            "student": config.student.model_copy(update={"model": absolute(config.student.model)}),
            "checkpoint": config.checkpoint.model_copy(update={"storage": absolute_storage(config.checkpoint.storage)}),
            "data": config.data.model_copy(update=data),
            "cache": config.cache.model_copy(update={"directory": absolute_storage(config.cache.directory)}),
        }
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested mapping into dotted keys; lists are values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
