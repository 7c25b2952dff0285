"""Processors that `taid-ray plan` knows: peak arithmetic, memory and memory bandwidth, from their makers' data sheets."""

import os
from dataclasses import dataclass
from difflib import get_close_matches

from taid_ray.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One GPU, or one CPU core with all the memory of this machine."""

    name: str
    bfloat16_flops: float
    """Peak dense operations per second of matmuls in bfloat16 or float16 (a multiplication and an addition are two)."""
    float32_flops: float
    """Peak of matmuls in float32 without TF32, which torch leaves off by default."""
    memory_bytes: float
    bandwidth: float
    """Bytes per second between the processor and its memory."""
    reserved_bytes: float
    """Bytes that are assumed to be lost to the process: a GPU's context, NCCL and fragmentation; a CPU process's code."""
    link: float = 3e9
    """Assumed bytes per second of this processor's share of its node's network, in each direction."""
    latency_s: float = 5e-5
    """Assumed seconds of a message between two nodes."""

    @property
    def is_cpu(self) -> bool:
        """Tells a CPU core from a GPU."""
        return self.name == "cpu"

    @property
    def collective(self) -> float:
        """Assumed bytes per second of each process in a ring of students. On CPUs it is gloo that sets it, not the network."""
        return _GLOO_BYTES_PER_S if self.is_cpu else self.link

    @property
    def teacher_reserved_bytes(self) -> float:
        """Bytes that are lost to a teacher's process, which loads less on a CPU."""
        return _CPU_TEACHER_RESERVED if self.is_cpu else self.reserved_bytes

    def flops(self, dtype_bytes: int) -> float:
        """Returns the peak of matmuls in a type of so many bytes, in operations per second."""
        return self.bfloat16_flops if dtype_bytes == 2 else self.float32_flops


_GPU_RESERVED = 2 * 2**30
"""Assumed: about 0.5 GiB of CUDA context, the buffers of NCCL and cuBLAS, and what the allocator cannot use."""
_CPU_RESERVED = 0.75 * 2**30
"""Roughly the resident size of a Python process with torch, transformers, DeepSpeed and Ray loaded."""
_CPU_TEACHER_RESERVED = 0.55 * 2**30
"""Roughly the same without DeepSpeed and the data."""
_GLOO_BYTES_PER_S = 0.3e9
"""Measured: 0.27e9 in all-gathers of 72 MB between two processes of one machine; all-reduces are faster."""
_TABLE = [
    # The last figure: nodes with a 400 Gbit/s adapter per GPU (H100, H200), 200 (A100-80G), 100 (A100-40G); else the default.
    # Dense figures: data sheets with "with sparsity" name twice as many for tensor cores.
    # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM: bfloat16 1,979 TFLOPS with sparsity, FP32 67, 80 GB, 3.35 TB/s.
    Hardware("h100-80g", 989.5e12, 67e12, 80e9, 3.35e12, _GPU_RESERVED, 50e9),
    # NVIDIA H200 Tensor Core GPU data sheet, H200 SXM: as H100 but for 141 GB and 4.8 TB/s.
    Hardware("h200-141g", 989.5e12, 67e12, 141e9, 4.8e12, _GPU_RESERVED, 50e9),
    # NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM: bfloat16 312 TFLOPS, FP32 19.5, 80 GB, 2,039 GB/s.
    Hardware("a100-80g", 312e12, 19.5e12, 80e9, 2.039e12, _GPU_RESERVED, 25e9),
    # The same, 40 GB (A100 data sheet of 2020): 1,555 GB/s.
    Hardware("a100-40g", 312e12, 19.5e12, 40e9, 1.555e12, _GPU_RESERVED, 12.5e9),
    # NVIDIA L40S data sheet: bfloat16 733 TFLOPS with sparsity (362.05 without), FP32 91.6, 48 GB, 864 GB/s.
    Hardware("l40s-48g", 362.05e12, 91.6e12, 48e9, 0.864e12, _GPU_RESERVED),
    # NVIDIA L4 data sheet: bfloat16 242 TFLOPS with sparsity, FP32 30.3, 24 GB, 300 GB/s.
    Hardware("l4-24g", 121e12, 30.3e12, 24e9, 0.3e12, _GPU_RESERVED),
]


def _this_cpu() -> Hardware:
    """Describes a core of this machine, without a data sheet: one with AVX2 does 2 fused multiply-adds of 8 float32 per
    cycle, here at an assumed 2.5 GHz.

    bfloat16 without AMX is no faster. 10 GB/s is a core's share of two memory channels, and the link one of 10 Gbit/s.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware("cpu", 80e9, 80e9, memory, 10e9, _CPU_RESERVED, 1.25e9)


NAMES = (*(gpu.name for gpu in _TABLE), "cpu")


def hardware_named(name: str) -> Hardware:
    """Returns the hardware of a name in NAMES; raises ConfigError for any other."""
    found = _this_cpu() if name == "cpu" else next((gpu for gpu in _TABLE if gpu.name == name), None)
    if found is None:
        close = get_close_matches(name, NAMES, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"--gpu: unknown hardware {name!r}{hint}; choose one of {', '.join(NAMES)}")
    return found
