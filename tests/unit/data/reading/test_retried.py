"""Data files on storage that fails now and then, or for good."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taid_ray import storage
from taid_ray.data.reading.retried import open_retried, size_of

CONTENT = bytes(random.Random(0).choices(range(256), k=3 << 20))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which take no time here."""
    found: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", found.append)
    return found


def failing(function: Callable[..., Any], fails: Callable[[], bool], number: int = errno.EIO) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if fails():
            raise OSError(number, os.strerror(number))
        return function(*arguments, **options)

    return call


def test_reads_what_is_there_and_leaves_nothing_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with open_retried(path) as file:
        assert file.read(10) == CONTENT[:10] and file.tell() == 10
        assert file.seek(-7, os.SEEK_END) == len(CONTENT) - 7 and file.read() == CONTENT[-7:]
        assert (
            file.seek(1 << 21)
            and file.seek(5, os.SEEK_CUR) == (1 << 21) + 5
            and file.peek()[:3] == CONTENT[file.tell() :][:3]
        )
        file.seek(0)
        assert file.read() == CONTENT and file.read() == b""
    assert len(os.listdir("/proc/self/fd")) == before and size_of(path) == len(CONTENT)


@pytest.mark.parametrize("which", ["open", "preadv"])
def test_every_second_call_fails(which: str, path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**6))
    monkeypatch.setattr(os, which, failing(getattr(os, which), lambda: next(calls) % 2 == 0))
    before = len(os.listdir("/proc/self/fd"))
    with open_retried(path) as file:
        assert file.read() == CONTENT
    assert pauses and len(os.listdir("/proc/self/fd")) == before


def test_a_handle_that_was_forgotten_is_replaced(
    path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stale: list[int] = []

    def preadv(number: int, *arguments: Any) -> int:
        stale.append(number) if not stale else None
        if number in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return plain(number, *arguments)

    plain, other = os.preadv, os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(os, "preadv", preadv)
    with open_retried(path) as file:
        monkeypatch.setattr(os, "close", lambda number: None)  # so that the new one has another number
        assert file.read() == CONTENT and len(pauses) == 1
    monkeypatch.undo()
    for number in (*stale, other):
        os.close(number)


def test_what_lasts_is_an_error_after_two_minutes(
    path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", failing(os.preadv, lambda: True))
    with open_retried(path) as file, pytest.raises(OSError, match="Input/output error"):
        file.read()
    assert 100 < sum(pauses) < 140


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EPERM])
def test_a_file_that_is_missing_or_forbidden_is_an_error_at_once(
    number: int, path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        size_of(path.with_name("absent"))
    with pytest.raises(IsADirectoryError), open_retried(path.parent) as file:
        file.read()
    monkeypatch.setattr(os, "open", failing(os.open, lambda: True, number))
    with pytest.raises(OSError, match=os.strerror(number)):
        open_retried(path)
    assert not pauses
