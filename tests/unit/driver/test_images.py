"""What the driver does in a run with images. No Ray runs."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taid_ray.config.schema import build_config
from taid_ray.data import run_images
from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.data.run_images import RunImages
from taid_ray.driver import cache_fill
from taid_ray.driver.cache_fill import FillResult
from taid_ray.driver.preflight import with_data
from taid_ray.errors import DataError, TeacherError
from taid_ray.media.reader import digest_of
from taid_ray.media.refs import ImageRef
from taid_ray.models.vocabulary import Vocabulary
from taid_ray.student.spec import DataCheck, RunSpec
from taid_ray.teacher.cache.offline import all_records
from tests.support.shown import noise
from tests.support.store import preparing_here
from tests.support.tiny_vision import save_tiny
from tests.support.views import View

CONFIG = build_config(
    {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"},
     "train": {"steps": 4, "micro_batch_size": 3, "batch_size": 3}}
)  # fmt: skip
SPEC = RunSpec(4, Vocabulary(7, (), (), 7), 0, DataCheck(1, 0, 0, 1))
PROCESSOR: Any = SimpleNamespace(grey=lambda image: b"grey")


def test_the_largest_images_of_a_request_are_known_once_the_data_are() -> None:
    def data(media: Any) -> Any:
        return SimpleNamespace(
            sources=[SimpleNamespace(fingerprint={})], digest="d", totals=SimpleNamespace(media=media)
        )

    found = with_data(CONFIG, SPEC, data({"images": 9, "largest_row_image_bytes": 1000}))
    assert (SPEC.image_bytes, found.image_bytes) == (0, 3000)
    assert with_data(CONFIG, SPEC, data(None)).image_bytes == 0


def test_images_that_documents_held_can_be_read_again() -> None:
    images = RunImages(PROCESSOR)
    digest = digest_of(b"content")
    ref = ImageRef(digest, 0, 1, 4, 3, images.encoder_media.keep(digest, b"content"))
    assert images.read(ref) == b"content" and images.encoder_media.tokens is PROCESSOR
    with pytest.raises(DataError, match="not in memory"):
        images.read(ImageRef("0" * 32, 0, 1, 4, 3, "memory:"))


def test_images_that_were_read_lately_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_images, "RECENT_BYTES", 25)
    refs = []
    for number in range(3):
        content = bytes([number] * 10)
        (tmp_path / f"{number}.png").write_bytes(content)
        refs.append(ImageRef(digest_of(content), 0, 1, 4, 3, f"file:{tmp_path}/{number}.png"))
    images = RunImages(PROCESSOR)
    assert [images.read(ref)[0] for ref in (refs[0], refs[1], refs[0], refs[2])] == [0, 1, 0, 2]
    for path in tmp_path.iterdir():
        path.unlink()
    assert [images.read(ref)[0] for ref in refs[1:]] == [1, 2]
    with pytest.raises(DataError, match="is missing"):
        images.read(refs[0])


def test_a_cache_is_not_filled_by_a_teacher_that_does_not_see() -> None:
    shown = Row([5, 9, 6], [0, 1, 2], [NO_LABEL, 6, NO_LABEL], images=(ImageRef("a" * 32, 1, 1, 4, 3, "file:a.png"),))
    rows: Any = SimpleNamespace(config=CONFIG, held_out=lambda: iter([shown] * 4))
    images, view = RunImages(PROCESSOR), View()

    def seeing(value: float) -> list[float]:
        teacher: Any = SimpleNamespace(seeing=lambda batch, without: [value for _ in batch.images])
        return cache_fill._seeing(rows, teacher, images, view)  # type: ignore[arg-type]

    assert seeing(0.5) == [0.5] * 4 and list(images.memory.values()) == [b"grey"]
    assert "the teacher's answers differ by 0.5 nats" in view.said[0]
    with pytest.raises(TeacherError, match="does not see"):
        seeing(0.001)


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FillResult]:
    """Fills a cache for four questions about pictures of noise with the outputs of a tiny teacher."""
    model = str(save_tiny("llava", tmp_path / "model"))
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(noise(20, 30, number))
    rows = [
        {"messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": f"cat {n}"}],
         "images": [f"{n}.png"]} for n in range(4)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fill(**data: Any) -> FillResult:
        config = build_config(
            {
                "teacher": {"model": model, "mode": "local", "dtype": "float32"},
                "student": {"model": model},
                "data": {"train": str(tmp_path / "rows.jsonl"), "format": "chat", "images_column": "images",
                         "images_directory": str(tmp_path), "valid_documents": 1, "sequence_length": 256,
                         "sees_at_least": 0.0} | data,
                "train": {"steps": 1, "batch_size": 2, "micro_batch_size": 2},
                "cache": {"directory": str(tmp_path / "cache")},
            }
        )  # fmt: skip
        with preparing_here():
            return cache_fill.fill_cache(config)

    return fill


def test_a_cache_is_filled_once_and_anew_for_a_picture_that_has_changed(
    filled: Callable[..., FillResult], tmp_path: Path
) -> None:
    first, again = filled(), filled()
    assert (first.rows, first.computed, again.computed, again.found) == (2, 4, 0, 4)
    ((_, record),) = all_records(tmp_path / "cache")
    assert record.seeing is not None and len(record.seeing) == 1 and record.seeing[0] > 0
    (tmp_path / "2.png").write_bytes(noise(20, 30, 99))
    changed = filled()  # the data are prepared anew with the new picture, whose answers are other ones
    assert (changed.computed, changed.found) == (1, 3)
