"""taid-ray: distil a large language model into a small one with TAID, on a Ray cluster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from taid_ray.config import DistillConfig, build_config, load_config

if TYPE_CHECKING:
    from taid_ray.launch import RunResult, distill
    from taid_ray.space import Space, load_space
    from taid_ray.tune import SearchResult, search

__all__ = [
    "DistillConfig",
    "RunResult",
    "SearchResult",
    "Space",
    "build_config",
    "distill",
    "load_config",
    "load_space",
    "search",
]
LAZY = {"RunResult": "launch", "distill": "launch", "Space": "space", "load_space": "space"} | {
    "SearchResult": "tune",
    "search": "tune",
}


def __getattr__(name: str) -> Any:
    """Loads what needs Ray only when it is asked for, so that the pure modules import alone."""
    if name in LAZY:
        return getattr(import_module(f"taid_ray.{LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
