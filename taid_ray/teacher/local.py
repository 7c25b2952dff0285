"""The teacher in the student worker's own process (`teacher.mode: local`)."""

import time

import torch

from taid_ray.config.models import TeacherConfig
from taid_ray.data.batch import Batch
from taid_ray.models.head import Head
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.payload import TeacherOutput
from taid_ray.teacher.protocol import TeacherInfo


class LocalTeacher:
    """A TeacherClient in the same process. Computes when an answer is collected, so nothing is held in between.

    The arguments and errors are those of TeacherModel and TeacherClient.
    """

    def __init__(self, config: TeacherConfig, num_shared: int, device: torch.device):
        self._model = TeacherModel(config, num_shared, device)
        self.tokens = 0

    def submit(self, batch: Batch) -> Batch:
        return batch

    def collect(self, request: Batch) -> TeacherOutput:
        info, start = self.info(), time.perf_counter()
        tensors = self._model.score(request.inputs, request.loss_positions, request.labels)
        info.check_output(tensors, request.num_loss_tokens)  # waits for a GPU, so the time below is all of it
        self.tokens += request.inputs["input_ids"].numel() if request.num_loss_tokens else 0
        return TeacherOutput(info.payload, tensors, time.perf_counter() - start)

    def payload_error(self, batch: Batch) -> float:
        return self._model.payload_error(batch.inputs, batch.loss_positions)

    def head(self) -> Head:
        return self._model.head()

    def info(self) -> TeacherInfo:
        return self._model.info()

    def close(self) -> None:
        pass
