"""A picture that a command was told to write."""

from pathlib import Path

from matplotlib.figure import Figure

from taid_ray.errors import ConfigError
from taid_ray.report.page import DPI


def check_picture(path: Path) -> None:
    """Raises ConfigError if the name of a picture, as --out gives it, is not that of a PNG file in a directory that exists."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--out: the picture is a PNG file, so its name ends in .png (found {path})")
    if not path.parent.is_dir():
        raise ConfigError(f"--out: {path} cannot be written: there is no directory {path.parent}; make it first")


def write_picture(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG. Raises ConfigError if that cannot be done."""
    try:
        figure.savefig(path, format="png", dpi=DPI)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written ({error}); name another place") from error
