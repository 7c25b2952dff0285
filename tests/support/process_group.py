"""A process group of this process alone, for DeepSpeed in the tests' own process."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def process_group() -> Iterator[None]:
    """Opens the group, and closes it. One for all of a process, because DeepSpeed keeps the first one it finds."""
    import torch.distributed as dist

    from taid_ray.student.deepspeed_internals import use_deepspeed_on

    use_deepspeed_on("cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        del os.environ[name]
