"""Copies of the teacher's answers from the CPU to the student's device, while the student computes."""

from dataclasses import replace
from typing import Any

import torch

from taid_ray.teacher.payload import TeacherOutput


class ToDevice:
    """Copies answers to a GPU beside its computation. On a CPU there is nothing to do."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, output: TeacherOutput) -> tuple[TeacherOutput, Any]:
        """Starts a copy. Returns the output on the device, and the CUDA event after which it is there (None on a CPU)."""
        if self._stream is None:
            return output, None
        # The object store's memory is not pinned, and from other memory no copy runs beside anything.
        with torch.cuda.stream(self._stream):
            pinned = replace(output, tensors={name: tensor.pin_memory() for name, tensor in output.tensors.items()})
            return pinned.to(self._device), self._stream.record_event()

    def wait(self, output: TeacherOutput, copied: Any) -> None:
        """Makes what the caller computes on the device from now on wait for the copy; the caller itself goes on."""
        if copied is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in output.tensors.values():
            tensor.record_stream(current)  # else its memory could be given to the next copy while this stream reads it
