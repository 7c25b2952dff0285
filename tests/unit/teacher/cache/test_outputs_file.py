"""Files of teacher outputs: what is wrong is refused with column and row, what is left out is derived."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from taid_ray.errors import DataError
from taid_ray.teacher.cache import outputs_file
from taid_ray.teacher.cache.nearest import describe_nearest
from taid_ray.teacher.cache.outputs import METADATA
from taid_ray.teacher.cache.outputs_file import OutputsFile
from tests.support.paths import ROOT

HALF = [math.log(0.5), math.log(0.25)]
ROWS: dict[str, Any] = {
    "input_ids": [[1, 2, 3], [4, 5, 6, 7], [9]],
    "loss_positions": [[0, 1], [2], []],
    "ids": [[[2, 3], [7, 0]], [[1, 7]], []],
    "log_probs": [[HALF, HALF], [HALF], []],
    "log_tail": [[HALF[1]] * 2, [HALF[1]], []],
    "label_log_probs": [[HALF[0], -3.0], [HALF[1]], []],
}


def opened(tmp_path: Path, changes: dict[str, Any], without: tuple[str, ...] = (), about: Any = None) -> OutputsFile:
    """A file of ROWS with some columns changed, for k = 2 and 10 shared ids."""
    table = pa.table({key: value for key, value in (ROWS | changes).items() if key not in without})
    metadata = {} if about is None else {METADATA: about if isinstance(about, bytes) else json.dumps(about).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "outputs.parquet")
    return OutputsFile(str(tmp_path / "outputs.parquet"), 2, 10)


def second(name: str, value: Any) -> dict[str, Any]:
    """ROWS with another value in row 2 of a column."""
    return {name: [ROWS[name][0], value, ROWS[name][2]]}


def test_rows_become_tensors_in_the_order_of_their_ids(tmp_path: Path) -> None:
    first, other = opened(tmp_path, {}).samples()  # the third predicts nothing
    assert first.tokens.tolist() == [1, 2, 3] and first.loss_positions.tolist() == [0, 1]
    assert first.tensors["ids"].tolist() == [[2, 3], [0, 7]] and first.tensors["ids"].dtype == torch.int32
    expected = torch.tensor([HALF, HALF[::-1]]).bfloat16()
    assert torch.equal(first.tensors["log_probs"], expected)
    assert other.tensors["label_log_probs"].tolist() == pytest.approx([HALF[1]])


def test_what_is_left_out_is_derived(tmp_path: Path) -> None:
    three = {"ids": [[[2, 3], [7, 0]], [[1, 5], [6, 2], [1, 7]], []], "log_probs": [[HALF, HALF], [HALF] * 3, []]}
    file = opened(tmp_path, three, without=("loss_positions", "log_tail", "label_log_probs"))
    first, other = file.samples()
    assert other.loss_positions.tolist() == [0, 1, 2]
    assert first.tensors["log_tail"].tolist() == pytest.approx([HALF[1]] * 2)
    unlikely = HALF[1] - math.log(8)  # label 3 is none of the two ids
    assert first.tensors["label_log_probs"].tolist() == pytest.approx([HALF[0], unlikely])
    assert other.tensors["label_log_probs"].tolist() == pytest.approx([HALF[1], HALF[0], HALF[1]])
    assert file.labels_outside == 1
    renormalised = {"log_probs": [[[math.log(0.5)] * 2] * 2, [[math.log(0.5)] * 2], []]}
    tail = next(opened(tmp_path, renormalised, without=("log_tail",)).samples()).tensors["log_tail"]
    assert tail.isfinite().all() and float(tail.max()) < -15


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (second("input_ids", [4, -5, 6, 7]), "row 2, column input_ids: a token id is negative"),
        (second("input_ids", None), "row 2, column input_ids: it is null"),
        (second("input_ids", [4, None, 6, 7]), "row 2, column input_ids: it is null, or holds null"),
        (second("loss_positions", [3]), "row 2, column loss_positions: a position is outside"),
        ({"loss_positions": [[1, 0], [2], []]}, "row 1, column loss_positions: they do not ascend"),
        (second("ids", [[1, 10]]), "row 2, column ids: an id is outside 0 to 9"),
        (second("ids", [[7, 7]]), "row 2, column ids: an id comes twice"),
        (second("ids", [[1, 7], [1, 7]]), "row 2, column ids: it has 2 entries for 1 loss positions"),
        (second("ids", [[1, 7, 8]]), "row 2, column ids: a position has 3 of them, but teacher.topk is 2"),
        (second("log_probs", [[HALF[0]]]), "row 2, column log_probs: a position has 1 of them, but teacher.topk is 2"),
        (second("log_probs", [[HALF[0], math.nan]]), "row 2, column log_probs: a log-probability is not finite"),
        (second("log_probs", [[HALF[0], -math.inf]]), "row 2, column log_probs: a log-probability is not finite"),
        (second("log_probs", [[0.1, -4.0]]), "row 2, column log_probs: a log-probability is above 0"),
        (second("log_probs", [[-0.1, -0.2]]), "row 2, column log_probs: the probabilities of a position and its log_tail add up"),
        (second("log_probs", [[-3.0, -4.0]]), "add up to 0.318 instead of 1; they must be natural logs"),
        (second("log_tail", [0.2]), "row 2, column log_tail: a log-probability is above 0"),
        (second("label_log_probs", [-math.inf]), "row 2, column label_log_probs: a log-probability is not finite"),
        (
            {"ids": [[[1, 2, 3]] * 2, [[1, 2, 3]], []], "log_probs": [[[-2.0] * 3] * 2, [[-2.0] * 3], []]},
            "row 1, column ids: a position has 3 of them, but teacher.topk is 2",
        ),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    for rows in (1, 64):  # numbers are those of the file, however many are read at a time
        monkeypatch.setattr(outputs_file, "BATCH_ROWS", rows)
        with pytest.raises(DataError, match=re.escape(expected)) as caught:
            list(opened(tmp_path, changes).samples())
        assert str(caught.value).startswith(f"teacher.outputs: {tmp_path / 'outputs.parquet'}: ")


def test_without_a_tail_the_mass_is_at_most_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2, column log_probs: .* add up to 1.72 instead of at most 1"):
        list(opened(tmp_path, second("log_probs", [[-0.1, -0.2]]), without=("log_tail",)).samples())


@pytest.mark.parametrize(
    ("changes", "without", "about", "expected"),
    [
        ({}, ("ids",), None, "it has no column ids (found input_ids,"),
        ({"ids": [[1, 2], [3], []]}, (), None, "column ids holds list<"),
        ({"log_probs": ROWS["ids"]}, (), None, "where lists of lists of floats are needed"),
        ({}, (), {"form": 2}, "says form 2, but here it is 1; read it with the version"),
        ({}, (), {"topk": 3}, "says topk 3, but here it is 2; set teacher.topk=3"),
        ({}, (), {"vocabulary": 11}, "says vocabulary 11, but here it is 10"),
        ({}, (), b"{", "its metadata taid_ray_outputs cannot be read"),
        ({}, (), [1], "its metadata taid_ray_outputs cannot be read"),
        ({}, (), {"teacher": {"model": "x"}}, "its metadata taid_ray_outputs cannot be read"),
    ],
)
def test_another_form_is_refused_when_it_is_opened(
    tmp_path: Path, changes: dict[str, Any], without: tuple[str, ...], about: Any, expected: str
) -> None:
    with pytest.raises(DataError, match=re.escape(expected)):
        opened(tmp_path, changes, without, about)


def test_what_is_no_whole_parquet_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        OutputsFile(str(tmp_path / "none"), 2, 10)
    path = Path(opened(tmp_path, {}).path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        OutputsFile(str(path), 2, 10)


def test_the_example_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (sample,) = OutputsFile("outputs.parquet", 2, 512).samples()
    assert sample.loss_positions.tolist() == [1, 2] and sample.tensors["ids"].tolist() == [[9, 407], [3, 261]]


def test_the_nearest_row_says_what_differs(tmp_path: Path) -> None:
    def told(tokens: list[int], where: list[int]) -> str:
        return describe_nearest(opened(tmp_path, {}).tokens(), np.array(tokens), np.array(where))

    assert "no row of the file begins with its first token 8" in told([8, 2], [0])
    assert "row 1 begins with the same 3 tokens, but has 2 loss positions instead of 1" in told([1, 2, 3], [1])
    assert "row 2 begins with the same 3 tokens of 4" in told([4, 5, 6], [1])
    assert "row 2 ends after the first 4 of its tokens" in told([4, 5, 6, 7, 8], [3])
    assert "the first 2 tokens are the same, and then comes 3 instead of 9" in told([1, 2, 9], [1])
