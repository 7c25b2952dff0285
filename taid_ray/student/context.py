"""A student worker's place in its run: ranks, device, and the connection to the run's scheduler actor."""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from taid_ray.checkpoint.store import CheckpointStore
from taid_ray.config.schema import DistillConfig
from taid_ray.distributed.device import torch_device
from taid_ray.distributed.world import World
from taid_ray.errors import ClusterError
from taid_ray.models.hub import hub_names, offline_if_unreachable
from taid_ray.run.layout import CONFIG_FILE
from taid_ray.scheduler.client import SchedulerClient
from taid_ray.student.preemption import PreemptionWatch, watch_node
from taid_ray.student.spec import WorkerSpec


@dataclass(frozen=True)
class WorkerContext:
    """Place of this process in the run, and its connection to the run's scheduler actor."""

    worker: WorkerSpec
    world: World
    device: torch.device
    scheduler: SchedulerClient
    store: CheckpointStore
    preemption: PreemptionWatch | None
    """Kept by one worker per node."""

    @property
    def config(self) -> DistillConfig:
        """The configuration of the run."""
        return self.worker.config

    def note(self, message: str) -> None:
        """Shows a line on the driver's terminal. Rank 0 speaks for all."""
        if self.world.is_main:
            self.scheduler.note(message)


def connect(worker: WorkerSpec, closing: ExitStack) -> WorkerContext:
    """Finds this process's place, and begins the attempt: no worker of an earlier one gets any further after that. Collective."""
    config, world, local_rank = worker.config, World.current(), int(os.environ["LOCAL_RANK"])
    scheduler = SchedulerClient(worker.scheduler, world.rank, config.peer_timeout_s)
    closing.callback(scheduler.close)
    if local_rank == 0:  # one worker speaks for its host
        check_run_dir_writable(config.run_dir, world.rank)
    offline_if_unreachable(hub_names(config))
    torch.manual_seed(config.train.seed + world.rank)
    if world.is_main:
        scheduler.begin(worker.attempt, world.size)
    world.barrier()  # nobody reads a checkpoint while an earlier attempt may still write one
    preemption = watch_node(world)
    if preemption is not None:
        closing.callback(preemption.close)
    device = torch_device(worker.device, local_rank)
    return WorkerContext(worker, world, device, scheduler, CheckpointStore(worker.checkpoints), preemption)


def check_run_dir_writable(run_dir: Path, rank: int) -> None:
    """Raises ClusterError if this node does not see the driver's run directory, or may not write there."""
    probe = run_dir / f".probe-{rank}"
    if not (run_dir / CONFIG_FILE).exists():
        raise ClusterError(
            f"out: the run directory {run_dir}, made by the driver, does not exist on node {os.uname().nodename}; "
            "choose a directory on a file system that all nodes share"
        )
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ClusterError(f"out: node {os.uname().nodename} cannot write to {run_dir}: {error}") from None
