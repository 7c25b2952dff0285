"""The teacher in the student worker's own process (`teacher.mode: local`)."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from taid_ray.config.models import TeacherConfig
from taid_ray.data.batch import Batch
from taid_ray.media.pictures import Read
from taid_ray.media.processor import MediaSettings
from taid_ray.models.head import Head
from taid_ray.teacher.model import TeacherModel
from taid_ray.teacher.payload import TeacherOutput
from taid_ray.teacher.pictures import RowPictures
from taid_ray.teacher.protocol import TeacherInfo


@dataclass(eq=False)
class LocalRequest:
    """A batch whose answer nobody has collected yet."""

    batch: Batch
    pictures: Future[RowPictures] | None = None
    """Its images, processed or being processed; None while that has not begun."""


class LocalTeacher:
    """A TeacherClient in the same process. Computes when an answer is collected, so nothing is held in between.

    Of images, those of the next request are processed by a thread meanwhile, and held until it is collected.
    """

    def __init__(
        self,
        config: TeacherConfig,
        num_shared: int,
        device: torch.device,
        media: MediaSettings | None = None,
        read: Read | None = None,
    ):
        """read: returns the bytes of an image, where `media` says that there are some. For the others, and for errors,
        see TeacherModel and TeacherClient.
        """
        self._model = TeacherModel(config, num_shared, device, media=media)
        self._read, self._processing = read, ThreadPoolExecutor(1, "taid-teacher-images")
        self._waiting: deque[LocalRequest] = deque()
        self.tokens = 0

    def submit(self, batch: Batch) -> LocalRequest:
        request = LocalRequest(batch)
        self._waiting.append(request)
        return request

    def collect(self, request: LocalRequest) -> TeacherOutput:
        pictures = self._begun(request)
        self._waiting.remove(request)
        shown = pictures.result()
        if self._waiting:
            self._begun(self._waiting[0])
        info, start, batch = self.info(), time.perf_counter(), request.batch
        tensors = self._model.score(batch.inputs, batch.loss_positions, batch.labels, shown)
        info.check_output(tensors, batch.num_loss_tokens)  # waits for a GPU, so the time below is all of it
        self.tokens += batch.inputs["input_ids"].numel() if batch.num_loss_tokens else 0
        return TeacherOutput(info.payload, tensors, time.perf_counter() - start)

    def payload_error(self, batch: Batch) -> float:
        return self._model.payload_error(batch.inputs, batch.loss_positions, self._pictures(batch))

    def seeing(self, batch: Batch, without: Batch) -> list[float]:
        shown = [self._pictures(one) for one in (batch, without)]
        return self._model.seeing(batch.inputs, batch.loss_positions, *shown)

    def head(self) -> Head:
        return self._model.head()

    def info(self) -> TeacherInfo:
        return self._model.info()

    def close(self) -> None:
        self._processing.shutdown(wait=False, cancel_futures=True)

    def _begun(self, request: LocalRequest) -> Future[RowPictures]:
        if request.pictures is None:
            request.pictures = Future()
            if request.batch.images:
                request.pictures = self._processing.submit(self._pictures, request.batch)
            else:
                request.pictures.set_result(())
        return request.pictures

    def _pictures(self, batch: Batch) -> RowPictures:
        if not batch.images:
            return ()
        assert self._read is not None, "a teacher that is shown images must be told how to read them"
        return self._model.pictures(batch.images, self._read)
