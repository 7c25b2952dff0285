"""A search's space, searcher and scheduler as Ray Tune takes them."""

from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from taid_ray.config.space import Space
from taid_ray.search.book import TrialBook


def sampled(space: Space) -> dict[str, Any]:
    """The space as Ray Tune takes it."""
    if space.search == "grid":
        return {key: tune.grid_search(list(distribution.arguments)) for key, distribution in space.space.items()}
    found = {}
    for key, distribution in space.space.items():
        arguments = [list(distribution.arguments)] if distribution.kind == "choice" else distribution.arguments
        found[key] = getattr(tune, distribution.kind)(*arguments)
    return found


def searcher(space: Space, book: TrialBook, concurrent: int) -> Searcher | SearchAlgorithm:
    """Ray Tune's searcher, which chooses the next trial. Trials of an earlier driver come first, with the same values."""
    if space.search != "optuna":
        return BasicVariantGenerator(random_state=space.seed, max_concurrent=concurrent)  # draws the same again
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Optuna's random numbers start anew; with the same seed it would propose the known trials once more.
    seed = space.seed + len(book.entries)
    return OptunaSearch(
        space=sampled(space), metric=space.metric, mode="min", seed=seed, points_to_evaluate=book.params() or None
    )


def scheduler(space: Space, total_steps: int) -> TrialScheduler:
    """Ray Tune's scheduler, which stops trials early by their validations."""
    grace = max(1, round(space.grace_fraction * total_steps))
    if space.scheduler == "asha":
        return ASHAScheduler(time_attr="step", max_t=total_steps, grace_period=grace, reduction_factor=space.reduction)
    if space.scheduler == "median":
        return MedianStoppingRule(time_attr="step", grace_period=grace)
    return FIFOScheduler()
