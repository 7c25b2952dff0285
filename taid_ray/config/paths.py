"""Paths in a configuration made absolute, because workers on a cluster start in other directories."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from taid_ray.config.data import SourceConfig
from taid_ray.config.schema import DistillConfig


def absolute_storage(value: str | None) -> str | None:
    """Makes the path of a directory absolute; leaves a URI as it is."""
    return value if value is None or "://" in value else str(Path(value).expanduser().absolute())


def is_pattern(name: str) -> bool:
    """Tells whether a name, if nothing exists under it, is a pattern for several files, as Python's glob understands it."""
    return "://" not in name and any(sign in name for sign in "*?[")


def with_absolute_paths(config: DistillConfig) -> DistillConfig:
    """Makes the paths of local files and directories absolute: workers on a cluster start in other directories."""

    def absolute(value: str | None) -> str | None:
        if not value or "{" in value:  # a chat template may be given as text
            return value
        with suppress(OSError, RuntimeError):  # a name too long for a file, or no such home: its reader says so
            path = Path(value).expanduser()
            return str(path.absolute()) if path.exists() else value
        return value

    def absolute_data(value: str | None) -> str | None:
        with suppress(RuntimeError):
            return str(Path(value).expanduser().absolute()) if value and is_pattern(value) else absolute(value)
        return value

    def absolute_source(source: SourceConfig) -> SourceConfig:
        paths = {key: absolute_data(getattr(source, key)) for key in ("path", "valid", "images_directory")}
        return source.model_copy(update=paths | {"chat_template": absolute(source.chat_template)})

    train = config.data.train
    data = {
        "train": absolute_data(train) if isinstance(train, str) else [absolute_source(source) for source in train],
        "valid": absolute_data(config.data.valid),
        "images_directory": absolute(config.data.images_directory),
        "chat_template": absolute(config.data.chat_template),
        "store": absolute_storage(config.data.store),
    }
    teacher = config.teacher
    return config.model_copy(
        update={
            "out": str(config.run_dir),
            "teacher": teacher
            and teacher.model_copy(
                update={"model": absolute(teacher.model), "outputs": absolute_storage(teacher.outputs)}
            ),
            "student": config.student.model_copy(update={"model": absolute(config.student.model)}),
            "checkpoint": config.checkpoint.model_copy(update={"storage": absolute_storage(config.checkpoint.storage)}),
            "data": config.data.model_copy(update=data),
            "cache": config.cache.model_copy(update={"directory": absolute_storage(config.cache.directory)}),
        }
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested mapping into dotted keys, `a[0].b` for what a list of mappings holds; other lists are values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            found |= flat({f"{key}[{number}]": item for number, item in enumerate(value)}, prefix)
        else:
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
