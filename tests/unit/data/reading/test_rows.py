"""Reading of one file: every value is what the file says, from any row on, and damage is told with its line."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from taid_ray.config.data import DataSource
from taid_ray.data.documents import open_documents
from taid_ray.errors import DataError


def read(path: Path, skip: int = 0, **settings: Any) -> dict[str, list[Any]]:
    """The columns of all rows after the first `skip`, and a check that they are the same with any block size."""
    documents = open_documents(DataSource(train=str(path), **settings), "train")
    by_size = []
    for size in (1, 2, 1000):
        found: dict[str, list[Any]] = {}
        for first, block in documents.blocks(skip, size):
            for name, values in block.items():
                assert first == skip + 1 + len(found.setdefault(name, []))
                found[name].extend(values)
        by_size.append(found)
    assert by_size[0] == by_size[1] == by_size[2]
    return by_size[0]


def texts(path: Path, content: str | bytes | None = None, **settings: Any) -> list[Any]:
    """The texts that a file of such a content gives, and a check that reading may begin at any row."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read(path, **settings)["text"]
    for skip in range(len(found)):
        assert read(path, skip, **settings)["text"] == found[skip:]
    return found


def refusal(path: Path, content: str | bytes, **settings: Any) -> str:
    """What is said of a file of such a content when all of it is read."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        open_documents(DataSource(train=str(path), **settings), "train").count()
    assert str(path) in str(caught.value)
    return str(caught.value)


CELLS = [
    "02139",
    "3.10",
    "True",
    "NA",
    "null",
    "None",
    "",
    "2024-01-01",
    "1e5",
    "-",
    'say "hi"',
    "a,b",
    "two\r\nlines",
    " x ",
]


@pytest.mark.parametrize(("name", "delimiter"), [("d.csv", ","), ("d.tsv", "\t"), ("d.CSV", ",")])
def test_a_cell_is_the_text_that_stands_there(tmp_path: Path, name: str, delimiter: str) -> None:
    """Fault 4: also those that look like numbers, truth values or nothing."""
    lines = [f'"{cell.replace(chr(34), 2 * chr(34))}"{delimiter}7' for cell in CELLS]
    content = "\ufefftext" + delimiter + "n\n" + "\n".join(lines) + "\n\n"
    assert texts(tmp_path / name, content) == CELLS
    unquoted = [cell for cell in CELLS if cell.isalnum()]
    assert (
        texts(tmp_path / name, f"n{delimiter}text\r\n" + "".join(f"{delimiter}{c}\r\n" for c in unquoted)) == unquoted
    )


def test_a_csv_cell_may_be_long_and_blank_lines_are_none(tmp_path: Path) -> None:
    assert texts(tmp_path / "d.csv", "\n\ntext\n" + "x" * 200_000 + '\n\n"a\n\nb"\n') == ["x" * 200_000, "a\n\nb"]
    assert texts(tmp_path / "d.csv", "text,b\nx,\n  \n\ny,\n") == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,text\n1,x\n1,x,z\n", "line 3 has 3 fields where the first line names 2"),
        ("a,text\n1,x\n1\n", "line 3 has 1 fields"),
        ('a,text\n1,"x" y\n', "line 2: ',' expected after '\"'"),
        ('a,text\n1,"x\n2,y\n', "line 3: unexpected end of data"),
        ("text,text\n1,x\n", "names the column 'text' 2 times"),
        (b"a,text\n1,x\n1,\xff\n", "line 3 is not utf-8"),
        ("a,b\n1,x\n", "has no column 'text' (it has: a, b)"),
    ],
)
def test_a_damaged_csv_file_is_told_by_its_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    assert said in refusal(tmp_path / "d.csv", content)


DATES = ["2024-01-01", "2024-03-05T10:00:00Z", "2024-01-01 10:00:00", "1e5", "\u2028 \x85 \u00e9"]


def test_strings_in_json_are_strings(tmp_path: Path) -> None:
    """Fault 5: also those that look like dates; and the mark before UTF-8 text is no part of them."""
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=False) for text in DATES]
    assert texts(tmp_path / "d.jsonl", "\ufeff" + "\n\n".join(lines) + "\n  \n") == DATES
    assert texts(tmp_path / "d.ndjson", "\r\n".join(lines)) == DATES


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_what_json_files_look_like(tmp_path: Path, name: str) -> None:
    one, two = {"text": "one", "x": [1, {"y": float("nan")}]}, {"text": "two", "x": "z"}
    path = tmp_path / name
    for content in (
        json.dumps([one, two]),
        json.dumps([one, two], indent=1),
        "\ufeff" + json.dumps([one, two]),
        json.dumps(["one", "two"]),
        json.dumps({"version": 1, "data": [one, two]}),
        json.dumps({"data": [one, two]}, indent=2),
        json.dumps(one) + json.dumps(two),  # a newline was lost
        json.dumps(one, indent=2) + "\n" + json.dumps(two, indent=2),  # as jq writes
        json.dumps(one) + "\r" + json.dumps(two),
    ):
        assert texts(path, content) == ["one", "two"], content
    assert texts(path, json.dumps({"text": "one", "data": [one, two]})) == ["one"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2, column 10: Expecting value"),
        ('{"text": "a"}\n[1]\n', "line 2 holds an array instead of an object"),
        ('{"text": "a"}\nnull\n', "line 2 holds null"),
        ('{"text": "a"}\n\n{"text": "b"} x\n', "line 3, column 15"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not utf-8"),
        ('{"text": "a"}\n{"text": "b", "n": ' + "9" * 5000 + "}\n", "line 2: Exceeds the limit"),
        ('{"text": "a"}\n{"text": ' + "[" * 100_000 + "\n", "line 2: maximum recursion depth"),
        ("[1, 2]\n", "value number 1 is a number instead of an object"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', "value number 1 is an array"),
        ('{"text": "a"\n{"text": "b"}\n', "line 1, column 13: Expecting ',' delimiter"),
        ('{"data": [{"body": "a"}]}\n', "has no column 'text' (it has: data)"),
        ("\ufffe".encode("utf-16") + '{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
    ],
)
def test_a_damaged_json_file_is_told_by_its_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    assert said in refusal(tmp_path / "d.jsonl", content)


def test_columns_that_are_not_needed_may_be_anything(tmp_path: Path) -> None:
    """Fault 22: they differ from row to row and file to file, and a needed one may come late."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.jsonl").write_text('{"response": "1", "id": 1}\n{"response": "2", "id": "x", "prompt": "p"}\n')
    (tmp_path / "d/b.jsonl").write_text('{"prompt": "q", "response": "3", "meta": {"a": [1, {}]}}\n')
    pq.write_table(
        pa.table({"response": ["4"], "prompt": ["r"], "when": [pa.scalar(10**18, pa.timestamp("ns"))]}),
        tmp_path / "c.parquet",
    )
    settings = {"format": "prompt_response"}
    assert read(tmp_path / "d", **settings) == {"prompt": [None, "p", "q"], "response": ["1", "2", "3"]}
    assert read(tmp_path / "c.parquet", **settings) == {"prompt": ["r"], "response": ["4"]}


def test_a_file_without_a_needed_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "a", "n": 1}\n')
    documents = open_documents(DataSource(train=str(tmp_path)), "train")
    with pytest.raises(
        DataError, match=r"data\.train: .*/b\.jsonl has no column 'text' \(it has: body, n\)\. Set data"
    ):
        documents.count()
    with pytest.raises(DataError, match=r"b\.jsonl has no column 'text'"):
        [*documents.blocks(0, 9)]


def test_a_file_without_rows_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "b.csv").write_text("text\n")
    (tmp_path / "c.csv").write_text("")
    documents = open_documents(DataSource(train=str(tmp_path)), "train")
    assert documents.count() == 1
    assert documents.description() == [
        f"data.train: {tmp_path}: 3 files of the kind csv, 1 row (a.csv, b.csv, c.csv)",
        f"data.train: {tmp_path}: without a row: b.csv, c.csv",
    ]


def test_usual_names_of_a_column_stand_in_for_it(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "hi"}]
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ({"conversations": talk}, {"messages": None, "conversations": talk}))
    )
    documents = open_documents(DataSource(train=str(tmp_path / "d.jsonl"), format="chat"), "train")
    ((_, block),) = documents.blocks(0, 9)
    assert block["messages"] == [talk, talk]
    assert "column 'conversations' is read as data.messages_column" in documents.description()[-1]


@pytest.mark.parametrize("group", [1, 2, 1000])
def test_parquet_columns_of_odd_types(tmp_path: Path, group: int) -> None:
    """Strings of every type, also categories, from any row on; what `datasets` stores as JSON is parsed."""
    words = [f"w{n % 3}" for n in range(7)]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        table = pa.table({"n": range(7), "text": pa.array(words).cast(kind), "text.x": words})
        pq.write_table(table, tmp_path / "d.parquet", row_group_size=group)
        assert texts(tmp_path / "d.parquet") == words
    talks = [[{"role": "user", "x": {"a": 1}}, {"role": "tool", "x": "y"}], [{"role": "user", "x": [1, "b"]}]]
    rows = datasets.Dataset.from_dict({"messages": talks}, on_mixed_types="use_json")
    rows.to_parquet(tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet", format="chat")["messages"] == talks


@pytest.mark.parametrize("writer", ["new_stream", "new_file"])
def test_arrow_files(tmp_path: Path, writer: str) -> None:
    table = pa.table({"text": [f"t{n}" for n in range(5)], "n": range(5)})
    with getattr(pa.ipc, writer)(str(tmp_path / "d.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=2)
    assert texts(tmp_path / "d.arrow") == [f"t{n}" for n in range(5)]
    for name in ("d.arrow", "d.parquet"):
        assert "cannot be read as" in refusal(tmp_path / name, (tmp_path / "d.arrow").read_bytes()[10:])


def test_text_files(tmp_path: Path) -> None:
    """Fault 16: the mark before UTF-8 text is no part of it. Lines end where `datasets` ended them."""
    assert texts(tmp_path / "d.txt", "\ufeffone\r\n\n two\x0b\x0c\u2028\rthree \n\t\n") == [
        "one",
        " two\x0b\x0c\u2028",
        "three ",
    ]
    assert "line 2 is not utf-8" in refusal(tmp_path / "d.txt", b"a\nb\xc3\x28\n")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt", "d.tsv"])
def test_compressed_files(tmp_path: Path, name: str) -> None:
    """In several parts, as pigz and pzstd write; damage is told."""
    rows = ["row 1", "row 2", "row 3"]
    jsons = [json.dumps({"text": row}) for row in rows]
    lines = jsons if name.startswith("d.json") else rows if name == "d.txt" else ["text", *rows]
    parts = [("\n".join(part) + "\n").encode() for part in (lines[:2], lines[2:])]
    for suffix, compress in (
        (".gz", gzip.compress), (".bz2", bz2.compress), (".zst", lambda part: pa.Codec("zstd").compress(part, asbytes=True)),
    ):  # fmt: skip
        content = b"".join(compress(part) for part in parts)
        assert texts(tmp_path / (name + suffix), content) == rows
        assert "cannot be read as" in refusal(tmp_path / (name + suffix), content[:-5])


def test_good_files_are_read_as_they_were(tmp_path: Path) -> None:
    """What the library `datasets` reads of files without traps, whose rows runs of before were trained on."""
    rows = [{"text": f"story {n}: \u00e9 \u2028 'x' \"y\", z\n{n}" + "." * n, "n": n} for n in range(50)]
    (tmp_path / "jsonl").mkdir()
    for part, some in enumerate((rows[:20], rows[20:])):
        (tmp_path / f"jsonl/{part}.jsonl").write_text("\n".join(json.dumps(row) for row in some))
    whole = datasets.Dataset.from_list(rows)
    for kind in ("csv", "parquet"):
        getattr(whole, f"to_{kind}")(str(tmp_path / f"d.{kind}"))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "d.txt").write_text("\n\n".join(row["text"] for row in rows))
    for reader, name in (
        ("json", "jsonl/*"),
        ("json", "d.json"),
        ("csv", "d.csv"),
        ("parquet", "d.parquet"),
        ("text", "d.txt"),
    ):
        before = datasets.load_dataset(
            reader, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache")
        )
        expected = [text for text in before["text"] if reader != "text" or text.strip()]
        assert texts(tmp_path / name.removesuffix("/*")) == expected, name
