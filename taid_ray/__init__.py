"""taid-ray: distil a large language model into a small one with TAID, on a Ray cluster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from taid_ray.config.schema import DistillConfig, build_config, load_config

if TYPE_CHECKING:
    from taid_ray.compare.driver import CompareResult, run_compare
    from taid_ray.config.space import Space, load_space
    from taid_ray.driver.launch import RunResult, distill
    from taid_ray.search.driver import SearchResult, run_search

__all__ = [
    "CompareResult",
    "DistillConfig",
    "RunResult",
    "SearchResult",
    "Space",
    "build_config",
    "distill",
    "load_config",
    "load_space",
    "run_compare",
    "run_search",
]
LAZY = {
    "CompareResult": "compare.driver",
    "RunResult": "driver.launch",
    "SearchResult": "search.driver",
    "Space": "config.space",
    "distill": "driver.launch",
    "load_space": "config.space",
    "run_compare": "compare.driver",
    "run_search": "search.driver",
}


def __getattr__(name: str) -> Any:
    """Loads what needs Ray only when it is asked for, so that the pure modules import alone.

    No name here may be a sub-package's: once that is imported, `from taid_ray import NAME` would find the package.
    """
    if name in LAZY:
        return getattr(import_module(f"taid_ray.{LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
