"""taid-ray: distil a large language model into a small one with TAID, on a Ray cluster."""

from typing import TYPE_CHECKING, Any

from taid_ray.config import DistillConfig, build_config, load_config

if TYPE_CHECKING:
    from taid_ray.launch import RunResult, distill

__all__ = ["DistillConfig", "RunResult", "build_config", "distill", "load_config"]


def __getattr__(name: str) -> Any:
    """Loads what needs Ray only when it is asked for, so that the pure modules import alone."""
    if name in ("RunResult", "distill"):
        from taid_ray import launch

        return getattr(launch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
