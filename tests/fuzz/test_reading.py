"""Mutated data files of every kind: what is trained is what a plain reading by Python's own modules gives, or there is an error.

FUZZ_FILES=10000 tries so many instead of a few.
"""

import bz2
import csv
import gzip
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from transformers import AutoTokenizer

from taid_ray.config.data import DataSource
from taid_ray.data.dataset import TrainingData
from taid_ray.data.documents import open_documents
from taid_ray.errors import DataError
from tests.support.feeding import FRAGMENTS, feed, mutated
from tests.support.paths import BUNDLE

FILES = int(os.environ.get("FUZZ_FILES", "250"))
TOKENIZER = AutoTokenizer.from_pretrained(BUNDLE / "stories260k")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for t in m.tool_calls or [] %}!{{ t.function.name }}({{ t.function.arguments | tojson }}){% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Row = dict[str, Any]

words = st.sampled_from([
    "a cat", "02139", "3.10", "NA", "null", "None", "True", "2024-01-01", "2024-03-05T10:00:00Z", "1e5", "-", "\u00e9\u2028", "'",
    '"', 'say "hi", x', "a,b", "two\nlines", " x ", "=1+1", "x\ufeff", "\\n", "{}", "[1]", "x" * 70,
])  # fmt: skip
texts = st.lists(words, min_size=1, max_size=2).map("".join)
arguments = st.dictionaries(st.sampled_from(["city", "expr", "n"]), words | st.integers(0, 9), max_size=2)
call = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": words, "arguments": arguments})})
answer = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts}, optional={"tool_calls": st.lists(call, max_size=2)}
)
talks = st.lists(st.tuples(texts, answer), min_size=1, max_size=2).map(
    lambda turns: [message for text, reply in turns for message in ({"role": "user", "content": text}, reply)]
)
others = st.dictionaries(
    st.sampled_from(["id", "meta", "score"]),
    st.integers() | texts | st.none() | st.lists(texts, max_size=2),
    max_size=2,
)
NEEDED = {"text": ["text"], "prompt_response": ["prompt", "response"], "chat": ["messages"]}
VALUES = {"text": texts, "prompt": texts, "response": texts, "messages": talks}
VALUE_BYTES = [
    b'"text"',
    b"3",
    b"null",
    b"[[{}]]",
    b'{"a": 1}',
    b'"\\ud800"',
    b"NaN",
    b'a,"',
    b",,,",
    b"}{",
    b'""',
    b"\r\n",
]


# Writing


def as_csv(rows: list[Row], draw: Callable[[Any], Any], delimiter: str) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    quoting, end = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])), draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.DictWriter(text, names, restval="", quoting=quoting, lineterminator=end, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(draw(st.sampled_from(["utf-8", "utf-8-sig"])))


def as_lines(rows: list[Row], draw: Callable[[Any], Any]) -> bytes:
    ascii_only, end = draw(st.booleans()), draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows).encode()


def as_json(rows: list[Row], draw: Callable[[Any], Any]) -> bytes:
    indent = draw(st.sampled_from([None, 1]))
    match draw(st.sampled_from(["lines", "array", "wrapped", "objects"])):
        case "lines":
            return as_lines(rows, draw)
        case "array":
            return json.dumps(rows, indent=indent).encode()
        case "wrapped":
            return json.dumps({"version": "1", "data": rows}, indent=indent).encode()
        case _:
            return "\n".join(json.dumps(row, indent=indent) for row in rows).encode()


def as_table(rows: list[Row], draw: Callable[[Any], Any]) -> pa.Table:
    """With columns of odd types; what is nested and differs from row to row is JSON text."""
    kind = draw(st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]))
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pa.array([as_cell(row.get(name)) for row in rows], pa.string()) for name in names}
    columns = {name: column.cast(kind) if name in VALUES else column for name, column in columns.items()}
    extra = {"when": pa.array(range(len(rows)), pa.timestamp("ns")), "text.x": pa.array([[1]] * len(rows))}
    return pa.table(columns | (extra if draw(st.booleans()) else {}))


def as_cell(value: Any) -> str | None:
    return value if isinstance(value, str | None) else json.dumps(value)


def written(rows: list[Row], kind: str, draw: Callable[[Any], Any]) -> bytes:
    match kind:
        case "csv" | "tsv":
            return as_csv(rows, draw, "," if kind == "csv" else "\t")
        case "jsonl":
            return as_lines(rows, draw)
        case "json":
            return as_json(rows, draw)
        case "txt":
            return draw(st.sampled_from(["\n", "\r\n", "\r"])).join(row["text"] for row in rows).encode()
    stream, table = pa.BufferOutputStream(), as_table(rows, draw)
    if kind == "parquet":
        pq.write_table(table, stream, row_group_size=draw(st.integers(1, 3)))
    else:
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return stream.getvalue().to_pybytes()


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


@st.composite
def data(draw: st.DrawFn) -> tuple[dict[str, bytes], str, list[Row] | None]:
    """Files by their names, whether one file or a directory; the format; the rows, unless a file was changed."""
    data_format = draw(st.sampled_from(list(NEEDED)))
    kinds = ["jsonl", "json", "parquet", "arrow"]
    kind = draw(
        st.sampled_from(
            [*kinds, *{"text": ["csv", "tsv", "txt"], "prompt_response": ["csv", "tsv"]}.get(data_format, [])]
        )
    )
    row = st.tuples(st.fixed_dictionaries({name: VALUES[name] for name in NEEDED[data_format]}), others).map(
        lambda parts: parts[0] | parts[1]
    )
    rows, files, changed = [], {}, draw(st.integers(0, 3))
    split = draw(st.sampled_from(["", "", "train-"]))
    for number in range(draw(st.integers(1, 3))):
        part = draw(st.lists(row, min_size=1, max_size=4))
        suffix = draw(st.sampled_from(["", *COMPRESS])) if kind not in ("parquet", "arrow") else ""
        content = written(part, kind, draw)
        if number == changed:
            content = draw(mutated([content], [*FRAGMENTS, *VALUE_BYTES]))
        content = COMPRESS[suffix](content)
        if number == changed and suffix and draw(st.booleans()):
            content = draw(mutated([content]))
        files[f"{split}{number}.{kind}{suffix}"] = content
        rows += part
    if draw(st.booleans()):
        files |= {".hidden.jsonl": b"{", "README.md": b"# x", "dataset_infos.json": b"{}", ".x/y.csv": b'"'}
        files |= {f"test.{kind}": b"\xff"} if split else {}
    return (
        files,
        data_format,
        rows if changed >= len([name for name in files if name[0] in "t0123" and "test" not in name]) else None,
    )


# Reading plainly


def plain_rows(name: str, content: bytes) -> list[Row]:
    """The rows of a file by Python's own modules (and pyarrow for its own kinds); whatever they raise."""
    kind, _, suffix = name.partition(".")[2].partition(".")
    match suffix:
        case "gz":
            content = gzip.decompress(content)
        case "bz2":
            content = bz2.decompress(content)
        case "zst":
            content = pa.input_stream(pa.BufferReader(content), compression="zstd").read()
    if kind == "parquet":
        file = pq.ParquetFile(pa.BufferReader(content))
        return file.read([name for name in VALUES if name in file.schema_arrow.names]).to_pylist()
    if kind == "arrow":
        table = pa.ipc.open_stream(content).read_all()
        table = table.select([name for name in VALUES if name in table.column_names])
        table.validate(full=True)
        return table.to_pylist()
    text = content.decode("utf-8-sig")
    if kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        records = [record for record in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if record]
        return [
            dict(zip(records[0], record, strict=True))
            for record in records[1:]
            if len(records[0]) == 1 or record[0].strip() or record[1:]
        ]
    if kind == "txt":
        return [{"text": line} for line in io.StringIO(text, newline=None).read().split("\n") if line.strip()]
    return plain_json(text)


def plain_json(text: str) -> list[Row]:
    try:
        values = [json.loads(line) for line in text.split("\n") if line.strip(" \t\r\n\v\f")]
    except ValueError:
        values, decoder = [], json.JSONDecoder()
        while text := text.lstrip(" \t\r\n"):
            value, end = decoder.raw_decode(text)
            values.append(value)
            text = text[end:]
    if len(values) == 1 and isinstance(values[0], list):
        return [{"text": value} if isinstance(value, str) else value for value in values[0]]
    if len(values) == 1 and not values[0].keys() & VALUES.keys():
        (values,) = (inner for inner in values[0].values() if isinstance(inner, list))
    return values


def plain_text(row: Row, data_format: str) -> str:
    """What is trained of a row, without the special tokens at its ends."""
    if data_format == "text":
        return str(row["text"])
    if data_format == "prompt_response":
        return f"{row['prompt'] or ''}\n{row['response']}"
    talk = row["messages"]
    talk = json.loads(talk) if isinstance(talk, str) else talk
    return "".join(
        f"<{message['role']}>{message['content']}{''.join(map(plain_call, message.get('tool_calls') or []))}</>"
        for message in talk
    )


def plain_call(call: Row) -> str:
    given = {key: value for key, value in call["function"]["arguments"].items() if value is not None}
    return f"!{call['function']['name']}({json.dumps(given, ensure_ascii=False)})"


# Comparing


def values_of(path: Path, config: DataSource, names: list[str], skip: int) -> list[Row]:
    documents = open_documents(config, "train")
    documents.count()
    return [
        {name: block[name][at] for name in names}
        for _, block in documents.blocks(skip, config.block_documents)
        for at in range(len(block[names[0]]))
    ]


def trained(config: DataSource) -> dict[int, list[int]]:
    """The tokens of each row, by its number."""
    found: dict[int, list[int]] = {}
    for sample in TrainingData(config, TOKENIZER, 0, 1).samples():
        found.setdefault(sample.document, []).extend(sample.input_ids)
    return found


def expected_tokens(row: Row, data_format: str) -> list[int]:
    """Of plain texts an end is always trained, too; a chat is what its template writes."""
    ids = TOKENIZER(plain_text(row, data_format), add_special_tokens=data_format != "chat")["input_ids"]
    return ids + [TOKENIZER.eos_token_id] * (data_format != "chat" and ids[-1:] != [TOKENIZER.eos_token_id])


def test_what_is_trained_is_what_the_files_say(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()

    def check(value: tuple[tuple[dict[str, bytes], str, list[Row] | None], int, int]) -> None:
        (files, data_format, rows), size, skip = value
        root = tmp_path / "data"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        read = [name for name in sorted(files) if "." in name[1:] and name[0] in "t0123" and "test" not in name]
        path = root / read[0] if len(files) == 1 else root
        template = TEMPLATE if data_format == "chat" else None
        config = DataSource(
            train=str(path), valid="no", format=data_format, sequence_length=4096, block_documents=size, chat_template=template,
            loss_on="all",
        )  # fmt: skip
        try:
            outcomes[compared(config, [(name, files[name]) for name in read], rows, skip)] += 1
        finally:
            shutil.rmtree(root)

    feed(st.tuples(data(), st.integers(1, 4), st.integers(0, 3)), FILES, check)
    print(dict(outcomes))
    assert (
        outcomes["right"] > FILES / 3 and outcomes["refused when opened"] + outcomes["refused when read"] > FILES / 20
    )


def compared(config: DataSource, files: list[tuple[str, bytes]], rows: list[Row] | None, skip: int) -> str:
    """Compares what is read and what is trained with the plain reading; says how it ended."""
    names = NEEDED[config.format]
    try:
        found = values_of(Path(config.train), config, names, 0)
        assert values_of(Path(config.train), config, names, skip) == found[skip:]
    except DataError as error:
        check_message(error)
        assert rows is None, error
        return "refused when opened"
    plain = [{name: row.get(name) for name in names} for name, content in files for row in plain_rows(name, content)]
    assert found == plain
    if rows is not None and not files[0][0].partition(".")[2].startswith(("csv", "tsv", "txt", "parquet", "arrow")):
        assert found == [{name: row[name] for name in names} for row in rows]
    try:
        tokens = trained(config)
    except DataError as error:
        check_message(error)
        return "refused when read"
    assert tokens == dict(expected(plain, config.format))
    return "right"


def expected(plain: list[Row], data_format: str) -> Iterator[tuple[int, list[int]]]:
    """The tokens of each row that has some."""
    for number, row in enumerate(plain, 1):
        ids = expected_tokens(row, data_format)
        if len(ids) > 1:
            yield number, ids


def check_message(error: DataError) -> None:
    text = str(error)
    assert "data." in text and "\n" not in text and len(text) < 2000, text
    assert error.__cause__ is None
