"""Images from every place that they can be at, and what is said if they are not there, or are others."""

import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from taid_ray.errors import DataError
from taid_ray.media import reader as reader_module
from taid_ray.media.headers import BadImage
from taid_ray.media.reader import ImageReader, digest_of, resolved
from taid_ray.media.refs import ImageRef

CONTENT = b"an image, as far as reading goes"


def ref(place: str, content: bytes = CONTENT) -> ImageRef:
    return ImageRef(digest_of(content), 0, 1, 8, 6, place)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a b!.png").write_bytes(CONTENT)
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cats/a!.png", CONTENT)
    (tmp_path / "x.pack").write_bytes(b"--" + CONTENT + b"--")
    return {
        "file": resolved("file:cats/a b!.png", str(tmp_path)),
        "zip": resolved("file:./cats/a!.png", str(tmp_path / "all.zip")),
        "pack": f"pack:{tmp_path}/x.pack@2+{len(CONTENT)}",
        "memory": "memory:",
    }


@pytest.mark.parametrize("kind", ["file", "zip", "pack", "memory"])
def test_reading_by_several_threads(kind: str, places: dict[str, str]) -> None:
    images = ImageReader({digest_of(CONTENT): CONTENT})
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(images.read, [ref(places[kind])] * 40)) == {CONTENT}


def test_absolute_paths_and_others_places_stay() -> None:
    assert resolved("file:/a/b.png", "/data") == "file:/a/b.png"
    assert resolved("file:a/b.png", "/data/") == "file:/data/a/b.png"
    assert resolved("pack:x@0+1", "/data") == "pack:x@0+1"


def test_another_image_than_the_reference_says(places: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cats" / "a b!.png").write_bytes(b"another")
    with pytest.raises(DataError, match=r"a b!\.png has changed since the data were prepared .*; restore it"):
        ImageReader().read(ref(places["file"]))
    with pytest.raises(DataError, match="memory: is not in memory"):
        ImageReader().read(ref("memory:"))
    with pytest.raises(DataError, match="is missing, though the data were prepared with it"):
        ImageReader().read(ref("file:/no/such.png"))


def test_places_without_a_usable_file(tmp_path: Path, places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "false.zip").write_bytes(b"PK no archive")
    damaged = bytearray((tmp_path / "all.zip").read_bytes())
    damaged[45] ^= 0xFF
    (tmp_path / "damaged.zip").write_bytes(damaged)
    expected = {
        f"file:{tmp_path}/none.png": "is missing",
        f"file:{tmp_path}/x.pack/none.png": "is missing",
        f"file:{tmp_path}/cats": "is a directory",
        f"file:{tmp_path}/pipe": "is no regular file",
        f"file:{tmp_path}/loop": "cannot be opened",
        f"file:{tmp_path}/{'x' * 300}": "cannot be opened",
        f"file:{tmp_path}/\0": "cannot be the name of a file",
        f"zip:{tmp_path}/none.zip!a": "none.zip does not exist",
        f"zip:{tmp_path}/all.zip!a.png": "has no such member; it has cats/a!.png, for example",
        f"zip:{tmp_path}/false.zip!a": "cannot be unpacked",
        f"zip:{tmp_path}/damaged.zip!cats/a!.png": "cannot be unpacked",
        f"pack:{tmp_path}/x.pack@2+999": "is not whole",
    }
    for place, reason in expected.items():
        with pytest.raises(BadImage, match=reason):
            ImageReader().content(place)
    monkeypatch.setattr(reader_module, "MOST_BYTES", len(CONTENT) - 1)
    for kind in ("file", "zip"):
        with pytest.raises(BadImage, match=f"has {len(CONTENT)} bytes, more than"):
            ImageReader().content(places[kind])


def test_few_archives_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "OPEN_ARCHIVES", 2)
    images = ImageReader()
    for number in [0, 1, 2, 0, 2]:
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as archive:
            archive.writestr("a", CONTENT)
        assert images.read(ref(f"zip:{tmp_path}/{number}.zip!a")) == CONTENT
        assert len(images._archives) <= 2
