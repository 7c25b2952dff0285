"""Checkpoints of a run in a directory or in object storage: which there are, which are whole, and their parts.

    STEP-ATTEMPT/state.json                    rank 0: schedule, data cursor and figures after STEP
    STEP-ATTEMPT/rank-RRRRR-PPP.safetensors    some parameters with their optimizer state, whole and in float32
    STEP-ATTEMPT/rank-RRRRR.json               sizes and digests of what that rank wrote; its last file

A checkpoint is whole once every rank's last file is there, so nobody has to commit it, and no storage needs a rename. What
a dead attempt left half written lies in a directory of its own. No file depends on how the run was laid out over workers
and ZeRO stages, and none is pickled: whoever can write to the storage can stop a run, not run code in it.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import xxhash
from pyarrow.fs import FileSelector, FileType
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from taid_ray.data.cursor import Cursor, read_cursor
from taid_ray.errors import CheckpointError, ConfigError
from taid_ray.scheduler.aggregate import SourceLoss, StepResult
from taid_ray.scheduler.schedule import ScheduleState
from taid_ray.storage import STORAGE_ERRORS, open_storage

FORMAT = 1
STATE_FILE = "state.json"


class TornCheckpointError(CheckpointError):
    """A checkpoint was not written to its end."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint was written to its end, and is not what was written any more."""


@dataclass(frozen=True)
class TrainingState:
    """Everything but tensors that a run continues from."""

    result: StepResult
    """The result of the last step, with the schedule's state, from which t follows."""
    cursor: Cursor
    """The place in the data. Learning rate and random numbers are not kept: they follow from the number of the step."""
    totals: dict[str, Any]
    """Figures for the summary, see `student.totals.RunTotals`."""
    data: dict[str, Any] | None = None
    """What the run is trained on, see `data.fingerprint`; None in checkpoints of older versions."""

    def to_json(self) -> bytes:
        """The content of state.json."""
        result = asdict(self.result) | {"schedule": self.result.schedule._asdict()}
        if not self.result.images:  # so that older versions read the checkpoints of runs without images
            result = {name: value for name, value in result.items() if name not in ("images", "image_bytes")}
        content = {"format": FORMAT, "result": result, "cursor": asdict(self.cursor), "record": self.totals}
        return json.dumps(content | ({} if self.data is None else {"data": self.data})).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "TrainingState":
        """Raises CheckpointError if the text is of another version of taid-ray, or nothing that `to_json` wrote."""
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"a checkpoint has format {content['format']}, and this taid-ray reads {FORMAT}; use the version that "
                    "wrote it"
                )
            schedule = ScheduleState.from_dict(content["result"].pop("schedule"))
            sources = tuple(SourceLoss(*source) for source in content["result"].pop("sources", ()))
            result = StepResult(schedule=schedule, sources=sources, **content["result"])
            cursor = read_cursor(content["cursor"])
            data = content.get("data")
            if not isinstance(content["record"], dict) or not isinstance(data, dict | None):
                raise TypeError("record or data")
            return cls(result, cursor, content["record"], data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(
                f"{STATE_FILE} is no state of a run ({type(error).__name__}: {error})"
            ) from error


@dataclass(frozen=True)
class File:
    """Size, checksum and content of a file, as the rank that wrote it says."""

    bytes: int
    digest: str
    tensors: list[str]


Index = dict[str, File]
"""Every file of a checkpoint, but for the ranks' last ones."""


class CheckpointStore:
    """The checkpoints of one run. Every process of the run has one; all see the same files."""

    def __init__(self, location: str):
        """location: a directory or a URI. Raises ConfigError if there is no such kind of storage here."""
        self.location = location
        try:
            self._fs, self._root = open_storage(location)
        except (ValueError, ImportError, *STORAGE_ERRORS) as error:
            raise ConfigError(
                f"checkpoint.storage: {location} cannot be used: {error}; name a directory or a URI such as "
                "s3://bucket/path, and install what its kind of storage needs"
            ) from error

    def names(self) -> list[str]:
        """Names of all checkpoints, whole or not, the newest first."""
        found = self._fs.get_file_info(FileSelector(self._root, allow_not_found=True))
        names = [info.base_name for info in found if info.type == FileType.Directory]
        return sorted((name for name in names if _is_name(name)), reverse=True)

    def index(self, name: str) -> Index:
        """The files of a checkpoint.

        Raises TornCheckpointError, or DamagedCheckpointError if a file is shorter than when it was written.

        Whether the files hold what was written shows when they are read.
        """
        infos = self._fs.get_file_info(FileSelector(f"{self._root}/{name}", allow_not_found=True))
        sizes = {info.base_name: info.size for info in infos if info.type == FileType.File}
        first = self._last_file(name, 0, sizes)
        world_size = first.get("world_size")
        if not isinstance(world_size, int) or not 1 <= world_size <= 10**6:
            raise DamagedCheckpointError(f"{name}/{last_file(0)} names {world_size!r} ranks")
        index: Index = {}
        if missing := [rank for rank in range(world_size) if last_file(rank) not in sizes]:
            # Before any is read: whoever waits for the checkpoint asks twice a second.
            raise TornCheckpointError(
                f"{name} has no {last_file(missing[0])}, and {len(missing)} of {world_size} ranks have not finished"
            )
        for rank in range(world_size):
            content = first if rank == 0 else self._last_file(name, rank, sizes)
            try:
                index |= {file: File(**found) for file, found in content["files"].items()}
            except (TypeError, KeyError, AttributeError) as error:
                raise DamagedCheckpointError(f"{name}/{last_file(rank)} lists no files ({error})") from error
        for file, expected in index.items():
            if sizes.get(file) != expected.bytes:
                raise DamagedCheckpointError(
                    f"{name}/{file} has {sizes.get(file)} bytes, and {expected.bytes} were written"
                )
        return index

    def read(self, name: str, file: str, expected: File) -> bytes:
        """The content of a file. Raises DamagedCheckpointError if it is not what was written."""
        content = self._read(name, file)
        if xxhash.xxh3_128_hexdigest(content) != expected.digest:
            raise DamagedCheckpointError(f"{name}/{file} is not what was written (checksum)")
        return content

    def read_tensors(self, name: str, file: str, expected: File) -> dict[str, Tensor]:
        """The tensors of a safetensors file. Raises DamagedCheckpointError if the file is not what was written."""
        try:
            return load(self.read(name, file, expected))
        except (SafetensorError, ValueError, KeyError) as error:
            raise DamagedCheckpointError(f"{name}/{file} holds no tensors ({error})") from error

    def write(self, name: str, file: str, content: bytes, tensors: list[str]) -> File:
        """Writes a file. Raises CheckpointError, leaving no part of it, if there is no room or the storage does not answer."""
        path = f"{self._root}/{name}/{file}"
        try:
            self._fs.create_dir(f"{self._root}/{name}", recursive=True)
            with self._fs.open_output_stream(path) as stream:
                stream.write(content)
        except STORAGE_ERRORS as error:
            with suppress(*STORAGE_ERRORS):
                self._fs.delete_file(path)
            raise CheckpointError(f"{self.location}/{name}/{file} cannot be written: {error}") from error
        return File(len(content), xxhash.xxh3_128_hexdigest(content), tensors)

    def write_tensors(self, name: str, file: str, tensors: Mapping[str, Tensor]) -> File:
        """Writes a safetensors file; see `write`."""
        return self.write(name, file, save(dict(tensors)), list(tensors))

    def finish(self, name: str, rank: int, world_size: int, files: Index) -> None:
        """Writes the rank's last file, which names all others."""
        content: dict[str, Any] = {"rank": rank, "world_size": world_size}
        content["files"] = {file: asdict(found) for file, found in files.items()}
        content["digest"] = _digest(content)
        self.write(name, last_file(rank), json.dumps(content).encode(), [])

    def delete(self, name: str) -> None:
        """Removes a checkpoint, the ranks' last files first, so that a crash leaves it torn and not damaged."""
        infos = self._fs.get_file_info(FileSelector(f"{self._root}/{name}", allow_not_found=True))
        for info in infos:
            if info.base_name.endswith(".json"):
                self._fs.delete_file(info.path)
        self._fs.delete_dir(f"{self._root}/{name}")

    def _last_file(self, name: str, rank: int, sizes: Mapping[str, int]) -> dict[str, Any]:
        if last_file(rank) not in sizes:
            raise TornCheckpointError(f"{name}: rank {rank} did not finish writing")
        try:
            content = json.loads(self._read(name, last_file(rank)))
        except (ValueError, RecursionError) as error:
            raise TornCheckpointError(f"{name}: rank {rank} did not finish writing ({error})") from error
        if not isinstance(content, dict) or content.pop("digest", None) != _digest(content) or content["rank"] != rank:
            raise DamagedCheckpointError(f"{name}/{last_file(rank)} is not what was written (checksum)")
        return content

    def _read(self, name: str, file: str) -> bytes:
        try:
            with self._fs.open_input_stream(f"{self._root}/{name}/{file}") as stream:
                return stream.read()
        except FileNotFoundError as error:
            raise TornCheckpointError(f"{name}/{file} is missing") from error
        except STORAGE_ERRORS as error:
            raise DamagedCheckpointError(f"{self.location}/{name}/{file} cannot be read: {error}") from error


def checkpoint_name(step: int, attempt: int) -> str:
    """Name of a checkpoint; names sort by step, then by attempt."""
    return f"step-{step:09d}-{attempt:020d}"


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.split("-")[1])


def last_file(rank: int) -> str:
    """Name of the file that a rank writes last."""
    return f"rank-{rank:05d}.json"


def tensor_file(rank: int, part: int) -> str:
    """Name of a rank's file of tensors."""
    return f"rank-{rank:05d}-{part:03d}.safetensors"


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


def _is_name(name: str) -> bool:
    parts = name.split("-")
    return len(parts) == 3 and parts[0] == "step" and all(part.isdecimal() for part in parts[1:])


def share(sizes: Iterable[tuple[str, int]], world_size: int) -> dict[str, int]:
    """The rank that writes each key, so that all write about the same number of bytes."""
    load = [0] * world_size
    owners = {}
    for key, size in sizes:
        owners[key] = load.index(min(load))
        load[owners[key]] += size
    return owners
