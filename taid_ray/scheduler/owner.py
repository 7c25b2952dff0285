"""The driver's side of the TAID scheduler actor: starts it, reads its notice board, ends it."""

import time
from typing import Self

import ray
from ray.actor import ActorHandle

from taid_ray.config.objective import ScheduleConfig
from taid_ray.errors import ClusterError
from taid_ray.names import NAMESPACE
from taid_ray.scheduler.actor import News, SchedulerActor

NAME_FREE_S = 60.0
"""Within this time Ray ends the actors of a driver that was killed."""
NEWS_S = 10.0
"""Limit for the actor's answer to the driver."""


class SchedulerOwner:
    """The actor's owner. A context manager: at its end the actor is gone."""

    def __init__(self, name: str, config: ScheduleConfig, total_steps: int, max_workers: int):
        """Restarted by Ray without limit if its process dies. max_workers: the most that will report to it.

        Raises ClusterError if another driver keeps an actor of that name, and therefore the run.
        """
        actor = ray.remote(SchedulerActor)
        # Each worker may wait here with a report, a heartbeat and a question about the pool, also while an earlier attempt's
        # workers are not quite gone; the rest is for the driver.
        concurrency = 2 * 3 * max_workers + 100
        options = actor.options(
            name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=-1, max_concurrency=concurrency
        )
        deadline = time.monotonic() + NAME_FREE_S
        while True:
            try:
                self.actor: ActorHandle = options.remote(config, total_steps)
                return
            except ValueError as error:  # taken; by a driver that was killed just now, if the name becomes free soon
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"this run is under way on this cluster: the actor {name} is another driver's; wait for that one, "
                        "or end it"
                    ) from error
                time.sleep(1.0)

    def ask(self, request: int) -> None:
        """Asks the workers for something after the step that is under way. Must be repeated until it has happened."""
        self.actor.ask.remote(request)

    def set_pool(self, error: Exception | None) -> None:
        """Tells the workers that the teacher pool is up, or why it is not. A restarted actor must be told again."""
        self.actor.set_pool.remote(error)

    def news(self, notes_seen: int) -> News:
        """News since the first `notes_seen` notes. Raises RayError while the actor is being restarted."""
        news: News = ray.get(self.actor.news.remote(notes_seen), timeout=NEWS_S)
        return news

    def close(self) -> None:
        """Ends the actor."""
        ray.kill(self.actor, no_restart=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
