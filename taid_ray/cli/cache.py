"""`taid-ray cache`: filling, looking at and emptying a cache of teacher outputs."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from taid_ray.config.schema import load_config
from taid_ray.config.training import CacheConfig
from taid_ray.errors import ConfigError
from taid_ray.report.format import print_line, shown_bytes

if TYPE_CHECKING:
    from taid_ray.teacher.cache.store import CacheStore

app = typer.Typer(help="Keep a teacher's outputs, and train without the teacher.", no_args_is_help=True)
Directory = Annotated[Path, typer.Argument(help="The cache.directory of a configuration.")]


@app.command()
def warm(
    config: Annotated[Path, typer.Argument(help="YAML configuration with cache.directory.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted key=value pairs.")] = None,
) -> None:
    """Compute the teacher's outputs for all data of a configuration.

    A run of it with teacher.mode=cache then needs no teacher."""
    loaded = load_config(config, overrides or [])
    console = Console()
    console.print("loading Ray, torch and transformers", highlight=False)
    from taid_ray.driver.cache_fill import fill_cache

    done = fill_cache(loaded)
    print_line(
        console,
        f"{done.rows:,} rows: {done.computed:,} samples computed ({done.teacher_tokens:,} teacher tokens), {done.found:,} "
        f"were there; the cache is {done.directory}",
    )


@app.command()
def export(
    config: Annotated[
        Path, typer.Argument(help="YAML configuration whose cache is filled, with teacher.payload: topk.")
    ],
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted key=value pairs.")] = None,
) -> None:
    """Write the teacher's outputs for all data of a configuration into one parquet file.

    Other tools can read it, and a run with teacher.mode=file trains from it."""
    loaded = load_config(config, overrides or [])
    console = Console()
    console.print("loading torch and transformers", highlight=False)
    from taid_ray.driver.cache_export import export_cache

    done = export_cache(loaded, out)
    shown = [
        ("file", str(out)),
        ("samples", f"{done.samples:,} with {done.positions:,} loss positions"),
        ("ids", f"{done.record.info.topk} of {done.record.info.num_shared:,} per position"),
        ("outside", f"{done.record.payload_error:.2g} of the probability, on the first validation rows"),
        ("size", shown_bytes(done.bytes)),
        ("teacher", done.record.model),
    ]
    for key, value in shown:
        print(f"{key:<9}{value}")


@app.command()
def stats(directory: Directory) -> None:
    """Show what a cache holds."""
    from taid_ray.teacher.cache.files import SUFFIX, total_bytes
    from taid_ray.teacher.cache.offline import all_records

    entries = [entry for entry in store(directory).entries() if entry.path.endswith(SUFFIX)]
    shown = [
        ("cache", str(directory)),
        ("samples", f"{len(entries):,}"),
        ("size", shown_bytes(total_bytes(entries))),
    ]
    if entries:
        shown.append(("used", f"{shown_time(min(entries).used)} (first) to {shown_time(max(entries).used)} (last)"))
    for path, record in all_records(directory):
        size = sum(file.stat().st_size for file in path.iterdir())
        what = f"{record.model}, payload {record.info.payload}, {record.info.dtype} ({shown_bytes(size)} for its head)"
        shown.append(("warmed", f"{record.at[:16].replace('T', ' ')}: {what}"))
    for key, value in shown:
        print(f"{key:<9}{value}")  # no table: it would break paths over lines


@app.command()
def prune(
    directory: Directory,
    max_gib: Annotated[float, typer.Option(min=0, help="Size (GiB) to keep; 0 empties the cache.")],
) -> None:
    """Remove what was not used for longest. Also safe while runs use the cache."""
    try:
        removed = store(directory).prune(int(max_gib * 2**30))
    except OSError as error:
        raise ConfigError(f"{directory} cannot be emptied ({error}); see who uses it and to whom it belongs") from None
    if max_gib == 0:
        import shutil

        from taid_ray.teacher.cache.offline import teachers_directory

        shutil.rmtree(teachers_directory(directory), ignore_errors=True)
    Console().print(f"{removed:,} samples removed", highlight=False)


def store(directory: Path) -> "CacheStore":
    """The samples of a cache. Raises ConfigError if there is none."""
    from taid_ray.teacher.cache.store import CacheStore, samples_directory

    if not samples_directory(directory).is_dir():
        raise ConfigError(f"{directory} holds no cache of teacher outputs; name the cache.directory of a configuration")
    return CacheStore(CacheConfig(directory=str(directory)), notify=lambda message: None)


def shown_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "minutes")
