"""The table of docs/architectures.md: its rows, as they are found and as they stand there.

`python -m tests.support.architectures.table` tries all architectures, on two processes, and writes the table anew.
"""

import gc
import logging
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

from tests.support.architectures.exam import CUTS, examine
from tests.support.architectures.fields import NOT_BUILT
from tests.support.architectures.report import Report
from tests.support.architectures.split import SplitTeacher
from tests.support.architectures.tiny import names
from tests.support.paths import ROOT
from tests.support.process_group import process_group

PAGE = ROOT / "docs" / "architectures.md"
HEADING = ("architecture", "exact", "packing", "cut", "split", "why not")
PLACE = re.compile(r"(?<=<!-- sweep -->\n).*(?=<!-- /sweep -->)", re.DOTALL)
REASONS = {
    "rebuilt from its hidden states and head": "its logits are not its hidden states times a matrix",
    "lets a position see the tokens that follow it": "not causal",
    "depend on the longest row of the batch": "what it computes of a row depends on the other rows of the batch",
    "cannot be saved as a Hugging Face model": "alone it cannot be loaded, because transformers knows its config only as a part",
    "(longrope)": "rows longer than `original_max_position_embeddings`, where longrope depends on the other rows of the batch",
    "keeps its output projection in float32": "as a student in float32 only, because transformers keeps its head so",
    "dtype: float32": "its forward pass fails in bfloat16",
    "cannot compute input_ids with position_ids": "its forward pass fails with ordinary rows",
}
"""What the table says, by a part of the package's message; the first that is found."""
FLOAT32 = "in float32"
Row = tuple[str, ...]
_open = ExitStack()
_split: list[SplitTeacher] = []


def row_of(report: Report) -> Row:
    """The row of an architecture that was tried. Raises LookupError for a refusal that REASONS has no words for."""
    steps = [key.removesuffix(" pack False") for key in report.refusals if not key.endswith("pack True")]
    if not report.accepted:
        return (report.name, "no", "", "", "", _reason(report, [step for step in steps if "float32" in step]))
    coarse = [step for step in steps if "bfloat16" in step]
    packing = FLOAT32 if any(key.endswith("bfloat16 pack True") for key in report.refusals) else "yes"
    cut = {0: "no", len(CUTS): "yes"}.get(len(report.cuts), "some layers")
    return (
        report.name,
        FLOAT32 if coarse else "yes",
        packing if report.packing else "no",
        cut,
        "yes" if report.split else "no",
        _reason(report, coarse) if coarse else "",
    )


def _reason(report: Report, steps: list[str]) -> str:
    """Puts what was refused in these steps into the words of the table."""
    refusals = [message for key, message in report.refusals.items() if key.removesuffix(" pack False") in steps]
    for part, words in REASONS.items():
        if any(part in message for message in refusals):
            return words
    raise LookupError(f"REASONS has no words for {refusals}")


def tried(name: str, directory: Path, split: SplitTeacher | None) -> tuple[Row, list[str]]:
    """Tries an architecture. Returns its row, and what is wrong."""
    if name in NOT_BUILT:
        return (name, "not tried", "", "", "", NOT_BUILT[name]), []
    report = examine(name, directory, split)
    try:
        return row_of(report), report.wrong
    except LookupError as error:
        return (name, "no", "", "", "", "?"), [*report.wrong, str(error)]


def page_rows() -> dict[str, Row]:
    """Reads the rows of the page, by architecture."""
    lines = re.findall(r"^\| `.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [tuple(cell.strip().strip("`") for cell in line.split("|")[1:-1]) for line in lines]
    return {row[0]: row for row in rows}


def versions() -> str:
    """Says with which packages the sweep is made."""
    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


def table(rows: list[Row]) -> str:
    """Draws the part of the page that the sweep writes."""
    exact, single, refused, left = (sum(row[1] == word for row in rows) for word in ("yes", FLOAT32, "no", "not tried"))
    counts = (
        f"{exact} are exact, {single} only in float32, {refused} are refused, {left} cannot be tried ({versions()})."
    )
    lines = [f"| {' | '.join(HEADING)} |", "|" + "---|" * len(HEADING)]
    lines += [f"| {' | '.join((f'`{row[0]}`', *row[1:]))} |" for row in rows]
    return f"{counts}\n\n" + "".join(re.sub(" +", " ", line) + "\n" for line in lines)


def _start() -> None:
    """Prepares a process that tries architectures."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    _open.enter_context(process_group())
    _split.append(SplitTeacher())
    gc.freeze()  # DeepSpeed collects often


def _try(name: str) -> tuple[Row, list[str]]:
    with tempfile.TemporaryDirectory() as directory:
        return tried(name, Path(directory), _split[0])


def main() -> None:
    """Writes the table, and says what is wrong."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    rows, count = [], 0
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_start) as pool:
        for row, wrong in pool.map(_try, names()):
            print(*(cell or "-" for cell in row), *(f"\n  WRONG {each}" for each in wrong), flush=True)
            rows, count = [*rows, row], count + len(wrong)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(PLACE.sub(lambda _: table(rows), text), encoding="utf-8")
    sys.exit(bool(count))


if __name__ == "__main__":
    main()
