"""Preparing training data: Ray tasks encode what the store lacks, on all nodes, and the driver makes the index of the whole.

Each task makes one shard from one span of the data (`data.store`). Tasks of this run and of others that prepare the same
share the work; after a node or a driver was lost, the shards that are there are found again.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import ray
from ray.exceptions import RayError, RayTaskError

from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import DistillConfig
from taid_ray.data.encoding import Counts
from taid_ray.data.store.assemble import assemble
from taid_ray.data.store.prepare import Encoding, prepare_span
from taid_ray.data.store.prepared import PreparedData, mixed
from taid_ray.data.store.remote import inside, open_store
from taid_ray.data.store.shard import ShardFacts
from taid_ray.data.store.spans import Span, spans_of
from taid_ray.distributed.cluster import ray_cluster
from taid_ray.driver import preflight
from taid_ray.driver.notes import say_notes
from taid_ray.driver.progress import ProgressView
from taid_ray.driver.signals import POLL_S, StopRequest, stop_signals
from taid_ray.errors import ConfigError, RunError, TaidRayError, shortened
from taid_ray.models.hub import restoring_hub_mode
from taid_ray.models.pair import image_backend, run_media, run_tokenizer
from taid_ray.run.directory import on_its_day

TASK_RETRIES = 3
"""Times that a span is prepared again after the loss of a node or of a process."""
TASKS_PER_CPU = 2
"""Tasks that are submitted, so that no CPU waits for the driver."""
PAUSE_S = 1.0
"""Time between two looks at spans that other runs are preparing."""

Told = Callable[[str], None]


@dataclass(frozen=True)
class Preparation:
    """Who is told of the work, and what it may use."""

    say: Told
    """Told what is to be kept in the log."""
    show: Told
    """Told, again and again, how far it is."""
    stop: StopRequest | None
    """Somebody's wish that the driver stops."""
    cpus: float = 1.0
    """CPUs that a task asks Ray for."""


def prepare_data(config: DistillConfig, num_shared: int, preparation: Preparation) -> PreparedData:
    """Prepares the training data of `config` in its store, on the connected cluster; takes what is there already.

    num_shared: token ids below it are known to both models. Raises DataError for documents that cannot be read or encoded,
    or that leave nothing to train on; RunError if the store cannot be written.
    """
    tokenizer, backend = run_tokenizer(config), image_backend() if config.data.has_images else None
    tokens, sources = run_media(config, backend), []
    for number, source in enumerate(config.data.sources):
        encoding, spans = Encoding(source, tokenizer, tokens), spans_of(source)
        location = str(inside(config.data_store, encoding.key))
        open_store(location).create()
        shards = SpanQueue(config, number, location, spans, preparation, backend).run()
        prepared = assemble(encoding, spans, shards, location, num_shared, preparation.say)
        found, documents = prepared.opened.totals, prepared.counts.documents
        said = f"{documents:,} documents are {found.rows:,} rows of {found.tokens:,} tokens in {location}"
        preparation.say(f"{source.key}: {said}")
        for line in _about_images(shards, prepared.counts):
            preparation.say(f"{source.key}: {line}")
        sources.append(prepared)
    data = mixed(config.data, sources)
    if len(sources) > 1:
        shares = zip(config.data.sources, data.uses, strict=True)
        parts = ", ".join(f"{uses:,} of {source.label}" for source, uses in shares)
        preparation.say(f"data.train: an epoch has {data.rows:,} rows: {parts}")
    return data


def _about_images(shards: Sequence[ShardFacts], counts: Counts) -> list[str]:
    """Says in sentences what became of the images of a source; nothing without any."""
    said = [f"{counts.images:,} image(s) are in the rows"] * counts.has_images
    if counts.bad_images:
        examples = next(shard.media["bad"] for shard in shards if shard.media and shard.media["bad"])
        said.append(
            f"{counts.bad_images:,} row(s) were left out for an image (data.bad_images: drop), for example: {examples}"
        )
    return said


def prepare_ahead(config: DistillConfig) -> PreparedData:
    """Prepares the training data of `config` without a run.

    Joins Ray or starts it, as a run does. Raises what a run raises until its data are prepared; KeyboardInterrupt or
    SystemExit after a request to stop.
    """
    config = on_its_day(with_absolute_paths(config))
    if config.data.order == "blocks":
        raise ConfigError("data.order: blocks encodes the data while it trains, so there is nothing to prepare")
    with restoring_hub_mode(), ProgressView() as view:
        view.say("checking models and data")
        spec = preflight.prepare(config)
        say_notes(config, spec, view.say, with_schedule=False)
        view.say("connecting to Ray" if os.environ.get("RAY_ADDRESS") else "starting Ray here")
        with ray_cluster(), stop_signals() as stop:
            return prepare_data(config, spec.vocabulary.num_shared, Preparation(view.say, view.wait_for, stop))


@dataclass
class SpanQueue:
    """The spans of a source, each of which waits for a task, is with one, or is done."""

    config: DistillConfig
    source: int
    """Number of the source among those of `config`."""
    location: str
    """The store of the shards; exists."""
    spans: Sequence[Span]
    preparation: Preparation
    backend: str | None = None
    """What processes images, see `models.pair.image_backend`; None without images."""
    _running: dict[ray.ObjectRef, int] = field(default_factory=dict)
    _done: dict[int, ShardFacts] = field(default_factory=dict)
    _ask_again_at: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    def run(self) -> list[ShardFacts]:
        """Prepares all spans; returns the facts of their shards, in order. Raises what a task raised."""
        waiting = deque(range(len(self.spans)))
        task = ray.remote(encode).options(
            num_cpus=self.preparation.cpus, max_retries=TASK_RETRIES, scheduling_strategy="SPREAD"
        )
        most = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        settings = self.config.model_dump_json()
        try:
            while len(self._done) < len(self.spans):
                if (stop := self.preparation.stop) is not None and stop.requested:
                    raise stop.end()
                while waiting and len(self._running) < most and time.monotonic() >= self._ask_again_at:
                    number = waiting.popleft()
                    self._running[
                        task.remote(self.spans[number], settings, self.source, self.location, self.backend)
                    ] = number
                self._take(waiting)
                self.preparation.show(self.progress())
        finally:
            for reference in self._running:
                ray.cancel(reference)
        return [self._done[number] for number in range(len(self.spans))]

    def _take(self, waiting: deque[int]) -> None:
        """Takes the results that have come; spans that another run prepares wait again."""
        if not self._running:
            time.sleep(POLL_S)
            return
        ready, _ = ray.wait([*self._running], num_returns=len(self._running), timeout=POLL_S)
        before = len(self._done)
        for reference in ready:
            number = self._running.pop(reference)
            try:
                facts, said = ray.get(reference)
            except RayTaskError as error:
                if isinstance(error.cause, TaidRayError):
                    raise error.cause from None
                raise RunError(f"{self.spans[number]} cannot be prepared: {shortened(error.cause)}") from error
            except RayError as error:
                raise RunError(
                    f"{self.spans[number]} cannot be prepared: {shortened(error)}; the task was tried {TASK_RETRIES + 1} "
                    f"times. If it ran out of memory, cut the file into smaller ones; start again to go on from what is there"
                ) from error
            for line in said:
                self.preparation.say(line)
            if facts is None:
                waiting.append(number)
            else:
                self._done[number] = facts
        if ready and len(self._done) == before:
            # What is left is perhaps all with other runs; to ask in a hurry would only take their time.
            self._ask_again_at = time.monotonic() + PAUSE_S

    def progress(self) -> str:
        """Says how far the work is: documents, tokens, documents per second, and the time left by the share of spans."""
        seconds, share = time.monotonic() - self._began, len(self._done) / len(self.spans)
        documents = sum(shard.documents for shard in self._done.values())
        tokens = sum(shard.tokens for shard in self._done.values())
        left = f", {seconds * (1 - share) / share:.0f} s left" if share else ""
        return (
            f"preparing data: {documents:,} documents, {tokens:,} tokens, {documents / max(seconds, 1e-3):,.0f} documents/s, "
            f"{len(self._done)} of {len(self.spans)} parts{left}"
        )


def encode(
    span: Span, settings: str, source: int, location: str, backend: str | None
) -> tuple[ShardFacts | None, list[str]]:
    """Prepares one span in a Ray worker. settings: the configuration as JSON. source: number of the span's source.

    backend: what processes images, None without any. Returns the facts of its shard, or None if another run is preparing it, and
    what is to be said.
    """
    said: list[str] = []
    facts = prepare_span(
        span, _encoding(settings, source, backend), location, lambda line: said.append(f"{line}; it is made anew")
    )
    return facts, said


@lru_cache(maxsize=1)
def _encoding(settings: str, source: int, backend: str | None) -> Encoding:
    """Loads the tokenizer once per process; one with code of its own could not be sent from the driver."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # before the tokenizer starts its threads: a task has one CPU
    config = DistillConfig.model_validate_json(settings)
    return Encoding(config.data.sources[source], run_tokenizer(config), run_media(config, backend))
