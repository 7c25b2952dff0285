"""How the fuzz tests make their inputs: what exists, changed a little, the same changes in every run."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SLOWEST_S = 10.0
"""Processor time after which one input counts as a hang."""
FRAGMENTS = [
    b"\x00",
    b"\xff\xfe",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    "\u2028\u00e9\U0001f600".encode(),
    b"\r",
    b"\t",
]


def feed(inputs: st.SearchStrategy[Any], examples: int, check: Callable[[Any], None]) -> None:
    """Calls `check` with `examples` inputs and makes sure that it was so many and that none took long."""
    ran, slowest = 0, 0.0

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(value: Any) -> None:
        nonlocal ran, slowest
        start = time.process_time()
        check(value)
        ran, slowest = ran + 1, max(slowest, time.process_time() - start)

    run()
    assert ran >= examples
    assert slowest < SLOWEST_S


@st.composite
def mutated(draw: st.DrawFn, originals: Sequence[bytes], fragments: Sequence[bytes] = FRAGMENTS) -> bytes:
    """One of the originals after up to three changes: of a byte, of whole lines, or of its length.

    `fragments` are put in the place of others: of the rest of a line from some ':' on, or between two bytes.
    """
    content = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 3))):
        content = draw(st.sampled_from(CHANGES))(draw, content, fragments)
    return content


def _flip(draw: st.DrawFn, content: bytes, _: Sequence[bytes]) -> bytes:
    at = draw(st.integers(0, max(0, len(content) - 1)))
    return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]


def _insert(draw: st.DrawFn, content: bytes, fragments: Sequence[bytes]) -> bytes:
    at = draw(st.integers(0, len(content)))
    return content[:at] + draw(st.sampled_from(fragments)) + content[at:]


def _replace_value(draw: st.DrawFn, content: bytes, fragments: Sequence[bytes]) -> bytes:
    lines = content.split(b"\n")
    at = draw(st.integers(0, len(lines) - 1))
    key, colon, _ = lines[at].partition(b":")
    lines[at] = key + (colon and b": ") + draw(st.sampled_from(fragments))
    return b"\n".join(lines)


def _lines(draw: st.DrawFn, content: bytes, _: Sequence[bytes]) -> bytes:
    """Drops a line, doubles it, or lets it change places with another one."""
    lines = content.split(b"\n")
    one, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    how = draw(st.sampled_from(["drop", "double", "swap", "indent"]))
    if how == "drop":
        del lines[one]
    elif how == "double":
        lines.insert(other, lines[one])
    elif how == "swap":
        lines[one], lines[other] = lines[other], lines[one]
    else:
        lines[one] = b" " * draw(st.integers(1, 5)) + lines[one].lstrip()
    return b"\n".join(lines)


def _cut(draw: st.DrawFn, content: bytes, _: Sequence[bytes]) -> bytes:
    start, stop = sorted(draw(st.integers(0, len(content))) for _ in range(2))
    return draw(st.sampled_from([content[:start], content[start:], content[:start] + content[stop:]]))


CHANGES = [_flip, _insert, _replace_value, _replace_value, _lines, _lines, _cut]
