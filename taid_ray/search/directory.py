"""The directory of a search: whether it may be used or taken up again, its lock, and its manifest search.yaml."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from taid_ray.config.fields import Range
from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import DistillConfig, stored_config
from taid_ray.config.space import Space
from taid_ray.config.text import read_tree
from taid_ray.config.training import CacheConfig
from taid_ray.errors import ConfigError, TaidRayError
from taid_ray.files import replace_text
from taid_ray.run.directory import changed_keys, locked, on_its_day
from taid_ray.run.layout import SEARCH_FILE
from taid_ray.search.book import TrialBook


def base_config(config: DistillConfig, out: str | Path | None, share_outputs: bool) -> DistillConfig:
    """The configuration that all trials have in common, with the search's directory as `out`."""
    directory = Path(out or f"runs/{config.name}-search").expanduser().absolute()
    cache = config.cache
    if config.teacher is None or (not share_outputs and not config.teacher.is_stored):
        cache = CacheConfig()
    elif not cache.on:
        cache = cache.model_copy(update={"directory": str(directory / "cache")})
    workers = Range(min=config.student.workers.min, max=config.student.workers.min)  # more would take room from trials
    student = config.student.model_copy(update={"workers": workers})
    config = with_absolute_paths(config.model_copy(update={"out": str(directory), "cache": cache, "student": student}))
    data = config.data.model_copy(update={"store": config.data_store})  # not one in the directory of each trial
    return on_its_day(config.model_copy(update={"data": data}), directory / SEARCH_FILE)


@contextmanager
def search_directory(config: DistillConfig, space: Space) -> Iterator[tuple[TrialBook, str]]:
    """Makes the search's directory, or takes it up again, and keeps other drivers out. Yields its book and its name.

    Removes a new one again if the search ends before its first trial. Raises ConfigError if the directory holds anything
    but the same search, or is in use.
    """
    directory = config.run_dir
    path = directory / SEARCH_FILE
    if directory.exists() and not path.exists() and any(directory.iterdir()):
        raise ConfigError(f"out: {directory} holds other files than a search's; choose another directory with --out")
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        before = read_tree(path) if path.exists() else {}
        book = TrialBook(directory)
        if before:
            _check_same(before, config, space, book)
        name = before.get("id") or f"{config.name}-{uuid.uuid4().hex[:8]}"
        content = {"id": name, "config": config.model_dump(mode="json"), "space": space.model_dump(mode="json")}
        replace_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        try:
            yield book, name
        except (TaidRayError, KeyboardInterrupt, SystemExit):
            if not before and not book.entries:
                shutil.rmtree(directory, ignore_errors=True)
            raise


def _check_same(before: dict[str, Any], config: DistillConfig, space: Space, book: TrialBook) -> None:
    """Raises ConfigError if the directory's search was begun with something else."""
    changed = changed_keys(stored_config(before["config"]), config)
    now, old = (
        space.model_dump(mode="json"),
        {"variants": {}, **before["space"]},
    )  # searches of before there were variants
    changed += [
        f"{key} (was {old.get(key)}, now {now[key]})" for key in now if key != "trials" and now[key] != old.get(key)
    ]
    if changed:
        raise ConfigError(
            f"out: {config.run_dir} holds a search that was begun with other values of {'; '.join(changed)}. Give them their "
            "old values to go on with it, or choose another directory with --out"
        )
    if space.num_trials < len(book.entries):
        raise ConfigError(
            f"trials: {space.num_trials} is fewer than the {len(book.entries)} that {config.run_dir} has already; ask for more"
        )
