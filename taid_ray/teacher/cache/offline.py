"""Training without a teacher: the record of it that `taid-ray cache warm` leaves beside its outputs, and its client.

DIRECTORY/teachers/FINGERPRINT/teacher.json        its TeacherRecord
DIRECTORY/teachers/FINGERPRINT/head.safetensors    its head, where the payload needs one
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from taid_ray.config.models import TeacherConfig
from taid_ray.config.schema import DistillConfig
from taid_ray.data.batch import Batch
from taid_ray.errors import ConfigError, TeacherError
from taid_ray.files import give_usual_mode, write_json
from taid_ray.losses.projection import LogitTransform
from taid_ray.media.processor import MediaSettings, load_media_processor
from taid_ray.models.head import Head
from taid_ray.models.loading import load_model_config
from taid_ray.teacher.cache.samples import samples_of
from taid_ray.teacher.fingerprint import head_digest
from taid_ray.teacher.payload import TeacherOutput, needs_head
from taid_ray.teacher.protocol import TeacherClient, TeacherInfo

TEACHER_FILE, HEAD_FILE = "teacher.json", "head.safetensors"
FORMAT = 1
END_BYTES = 2**20
COPY = "give the same command again, which copies them there from teacher.outputs"
WARM = "run `taid-ray cache warm` with this configuration"


@dataclass(frozen=True)
class TeacherRecord:
    """Content of a teacher.json."""

    info: TeacherInfo
    settings: str
    """SHA-256 of the teacher's configuration and of its model's config."""
    model: str
    revision: str | None
    weights: dict[str, list[Any]]
    """Size and digest of the ends of each file that holds weights, by its name."""
    payload_error: float
    at: str
    """When the cache was filled (ISO 8601)."""
    seeing: list[float] | None = None
    """How far images changed what the teacher predicted, see TeacherModel.seeing; None for a teacher that is shown none."""


class OfflineTeacher:
    """The TeacherClient of teacher.mode: cache and file. It knows the teacher's record and computes nothing."""

    tokens = 0

    def __init__(self, config: DistillConfig, num_shared: int, outputs: str = "", media: MediaSettings | None = None):
        """outputs: with mode file, the fingerprint of teacher.outputs. media: how images are processed, if there are any.

        Raises ConfigError as `find_record` and `file_record`.
        """
        self._mode = config.given_teacher.mode
        self._directory, self._record = (
            file_record(config, outputs) if outputs else find_record(config, num_shared, media)
        )

    def submit(self, batch: Batch) -> NoReturn:
        """Raises TeacherError, because only samples that the cache does not hold are asked for."""
        count = len(samples_of(batch, "", with_labels=False))
        raise TeacherError(
            f"teacher.mode: {self._mode}: {count} sample(s) of a batch are not in the cache {self._directory.parents[1]}; "
            f"{WARM if self._mode == 'cache' else COPY}. If you did, they were removed since: raise cache.disk_gib"
        )

    def collect(self, request: NoReturn) -> TeacherOutput:
        raise AssertionError("nothing was asked for")

    def payload_error(self, batch: Batch) -> float:
        """Returns what the payload loses, as it was measured when the cache was filled."""
        return self._record.payload_error

    def seeing(self, batch: Batch, without: Batch) -> list[float]:
        """Returns what was measured when the cache was filled, on the first validation rows with an image."""
        return list(self._record.seeing or ())

    def head(self) -> Head:
        """Reads the teacher's head. Raises TeacherError if the file is missing or damaged."""
        path, info = self._directory / HEAD_FILE, self._record.info
        try:
            tensors = load_file(path)
            head = Head(tensors["weight"], tensors.get("bias"), info.transform)
            fine = head_digest(head) == info.head_digest
        except (OSError, SafetensorError, ValueError, LookupError):
            fine = False
        if not fine:
            raise TeacherError(f"the teacher's head in {path} is damaged or missing; {WARM}")
        return head

    def info(self) -> TeacherInfo:
        return self._record.info

    def close(self) -> None:
        pass


def save_record(
    config: DistillConfig,
    teacher: TeacherClient,
    payload_error: float,
    seeing: list[float] | None = None,
    media: MediaSettings | None = None,
) -> None:
    """Writes the teacher's record and head into the cache, for later runs without it.

    seeing: see TeacherRecord. media: how images are processed, if there are any.
    """
    info, section = teacher.info(), config.given_teacher
    directory = teachers_directory(str(config.cache.directory)) / info.fingerprint
    directory.mkdir(parents=True, exist_ok=True)
    if needs_head(info.payload):
        head = teacher.head()
        bias = {} if head.bias is None else {"bias": head.bias.cpu().contiguous()}
        temporary = directory / "head.tmp"
        save_file({"weight": head.weight.cpu().contiguous()} | bias, temporary)
        give_usual_mode(temporary)
        temporary.replace(directory / HEAD_FILE)
    record = TeacherRecord(
        info=info,
        settings=_settings(config, info.num_shared, media),
        model=section.model,
        revision=section.revision,
        weights=weight_files(section),
        payload_error=payload_error,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        seeing=seeing,
    )
    write_record(str(config.cache.directory), record)


def write_record(directory: str, record: TeacherRecord) -> None:
    """Writes a teacher.json into a cache.directory. Raises RunError if it cannot be written."""
    path = teachers_directory(directory) / record.info.fingerprint / TEACHER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {key: value for key, value in asdict(record).items() if key != "seeing" or value is not None}
    write_json(path, {"format": FORMAT} | known)


def file_record(config: DistillConfig, fingerprint: str) -> tuple[Path, TeacherRecord]:
    """Reads the record of a file of outputs that was copied into the cache; returns its directory, too.

    Raises ConfigError if there is none.
    """
    directory = teachers_directory(str(config.cache.directory)) / fingerprint
    try:
        return directory, _read(directory / TEACHER_FILE)
    except (OSError, ValueError, TypeError, LookupError):
        raise ConfigError(
            f"teacher.mode: file: {directory} holds no record of the outputs in teacher.outputs; {COPY}, and name a "
            "cache.directory that all nodes see"
        ) from None


def find_record(
    config: DistillConfig, num_shared: int, media: MediaSettings | None = None
) -> tuple[Path, TeacherRecord]:
    """Finds the newest record of the teacher that `config` names; returns its directory and its content.

    media: how images are processed, if there are any. Raises ConfigError if there is no record, or if the teacher's weights
    on this machine are not those of the record.
    """
    directory, teacher = str(config.cache.directory), config.given_teacher
    settings = _settings(config, num_shared, media)
    known = [entry for entry in all_records(directory) if entry[1].settings == settings]
    weights = weight_files(teacher)
    if weights:
        fitting = [entry for entry in known if entry[1].weights == weights]
        if known and not fitting:
            raise ConfigError(
                f"teacher.mode: cache: the weights of teacher.model = {teacher.model} are others than those whose "
                f"outputs cache.directory = {directory} holds (since {known[0][1].at}); {WARM}, or name the old model"
            )
        known = fitting
    else:  # two finetuned versions of one model differ in nothing but their names
        named = [entry for entry in known if (entry[1].model, entry[1].revision) == _name(teacher)]
        known = named or (known if len({entry[1].info.fingerprint for entry in known}) == 1 else [])
    if not known:
        raise ConfigError(
            f"teacher.mode: cache: cache.directory = {directory} holds no outputs of teacher.model = {teacher.model} "
            f"with these teacher settings; {WARM}"
        )
    return known[0]


def all_records(directory: str | Path) -> list[tuple[Path, TeacherRecord]]:
    """Reads the records in a cache, the newest first, each with its directory; leaves out what cannot be read."""
    records = []
    for path in teachers_directory(directory).glob(f"*/{TEACHER_FILE}"):
        try:
            records.append((path.parent, _read(path)))
        except (OSError, ValueError, TypeError, LookupError):
            continue
    return sorted(records, key=lambda entry: entry[1].at, reverse=True)


def weight_files(config: TeacherConfig) -> dict[str, list[Any]]:
    """Size and digest of the ends of each file with the teacher's weights, by its name; empty if they are not on this machine."""
    directory = _model_directory(config)
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]) if directory else []
    return {path.name: [path.stat().st_size, _ends(path)] for path in files}


def teachers_directory(directory: str | Path) -> Path:
    """The directory of the teachers' records in a cache.directory."""
    return Path(directory).expanduser() / "teachers"


def _model_directory(config: TeacherConfig) -> Path | None:
    """The teacher's directory on this machine, or in its Hugging Face cache; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    directory = Path(config.model).expanduser()
    if directory.is_dir():
        return directory
    try:
        return Path(snapshot_download(config.model, revision=config.revision, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        return None


def _ends(path: Path) -> str:
    """Digest of the first and last END_BYTES of a file, because reading all of the weights takes minutes."""
    result = xxhash.xxh3_128()
    with path.open("rb") as file:
        result.update(file.read(END_BYTES))
        file.seek(max(0, path.stat().st_size - END_BYTES))
        result.update(file.read(END_BYTES))
    return result.hexdigest()


def _name(config: TeacherConfig) -> tuple[str, str | None]:
    return config.model, config.revision


def _settings(config: DistillConfig, num_shared: int, media: MediaSettings | None) -> str:
    """SHA-256 of everything but the weights that the teacher's outputs depend on."""
    teacher = config.given_teacher
    model = load_model_config(teacher).to_dict()
    known = {key: value for key, value in model.items() if key not in ("_name_or_path", "transformers_version")}
    topk = teacher.topk if teacher.payload == "topk" else None
    sent: list[Any] = [known, teacher.dtype, teacher.quantization, teacher.payload, topk, num_shared]
    if media is not None:
        sent.append(load_media_processor(teacher.model, media, "teacher.model", teacher.revision).identity())
    return hashlib.sha256(json.dumps(sent, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> TeacherRecord:
    """Reads a teacher.json. Raises ValueError, TypeError or LookupError if it is no record of this version."""
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise ValueError("of another version")
    return record_of({key: value for key, value in content.items() if key != "format"})


def record_of(values: Mapping[str, Any]) -> TeacherRecord:
    """Makes a record of what `asdict` made of it. Raises TypeError or LookupError if that is something else."""
    info = values["info"]
    return TeacherRecord(
        **dict(values) | {"info": TeacherInfo(**info | {"transform": LogitTransform(**info["transform"])})}
    )
