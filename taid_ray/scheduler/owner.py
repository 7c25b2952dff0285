"""The driver's side of the TAID scheduler actor: starts it, reads its notice board, ends it."""

import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from taid_ray.config.schema import ScheduleConfig
from taid_ray.errors import ClusterError
from taid_ray.scheduler.actor import NAMESPACE, SchedulerActor

NAME_FREE_S = 60.0
"""Within this time Ray ends the actors of a driver that was killed."""


class SchedulerOwner:
    """The driver's side: starts the actor, hears from it what the workers say, and ends it."""

    def __init__(self, name: str, config: ScheduleConfig, total_steps: int, max_workers: int):
        """Restarted by Ray without limit if its process dies. max_workers: the most that will report to it.

        Raises ClusterError if another driver keeps an actor of that name, and therefore the run.
        """
        actor = ray.remote(SchedulerActor)
        # Of every worker a report that waits for the others, a heartbeat, and word of the pool; of two attempts, where one
        # is not quite over; and the driver's own.
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

    def progress(self, notes_seen: int) -> tuple[list[str], dict[str, Any], list[dict[str, Any]]]:
        """Notes after the first `notes_seen`, the newest metrics, and all validations that this actor was told of.

        Nothing while it is being restarted.
        """
        try:
            return ray.get(self.actor.progress.remote(notes_seen), timeout=10)
        except RayError:
            return [], {}, []

    def close(self) -> None:
        ray.kill(self.actor, no_restart=True)
