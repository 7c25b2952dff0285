"""Whatever a dataset holds: rows that teacher and student can take, or an error in one line that says where to look."""

import json
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from transformers import AutoTokenizer

from taid_ray.config.data import DataSource
from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.data.columns import columns_of
from taid_ray.data.dataset import TrainingData, validation_rows
from taid_ray.data.encoding import Encoder
from taid_ray.data.packing import to_rows
from taid_ray.data.reading.hub import HubDocuments
from taid_ray.errors import DataError
from tests.support.feeding import FRAGMENTS, feed, mutated
from tests.support.paths import BUNDLE

TOKENIZER = AutoTokenizer.from_pretrained(BUNDLE / "stories260k")
LENGTH = 24
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['content'] | trim }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
TURN = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]
SAMPLES: list[dict[str, Any]] = [
    {"text": f"one day {n}", "prompt": "who", "response": "a cat " * n, "messages": TURN} for n in range(1, 7)
]

words = st.sampled_from(["a cat", "", " ", "\n", "é\u2028\U0001f600", "\x00", "\ud800", "</s>", "<s>", "x" * 300])
texts = words | st.text(max_size=30)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=4) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=4,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "", "Assistant"])
calls = st.lists(st.fixed_dictionaries({"name": words, "arguments": anything}), max_size=2)
messages = st.fixed_dictionaries(
    {"role": roles, "content": texts | st.lists(texts, max_size=2)}, optional={"name": anything, "tool_calls": calls}
)
shared = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "narrator"]), "value": texts})
odd_messages = messages | st.fixed_dictionaries({"role": roles | anything, "content": anything}) | anything
lists = st.lists(messages, min_size=1, max_size=4) | st.lists(shared, min_size=1, max_size=3)
conversations = (
    lists | lists.map(lambda value: json.dumps(value, default=str)) | st.lists(odd_messages, max_size=3) | anything
)
ODD_JINJA = [
    "{{ 1 / 0 }}", "{{ messages[9] }}", "{{ messages[9].x.y }}", "{{ raise_exception('a\nb') }}", "{{ nope() }}", "{{", "{% if",
    "{% include 'x' %}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x'.__class__.__mro__ }}", "{{ '\ud800' }}", "\ud800",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 10 ** 9 % '' }}", "{% generation %}", "{{ '%d' % 'x' }}",
    "{{ messages.append(3) }}", "{% endfor %}", "{% set messages = 3 %}", "{{ messages | length }}", "\0",
    "{{ 2 ** 99999 }}", "{{ x | y }}",
]  # fmt: skip
TEMPLATES = [template.encode() for template in (CHATML, PLAIN)]
ODD_TEMPLATES = [template + odd for template in (CHATML, PLAIN) for odd in ODD_JINJA] + [
    odd + CHATML for odd in ODD_JINJA
]
mutated_templates = mutated(
    TEMPLATES, [odd.encode(errors="surrogateescape") for odd in ODD_JINJA if odd.isascii()]
).map(lambda content: content.decode(errors="surrogateescape"))
templates = st.sampled_from([CHATML, PLAIN]) | st.sampled_from(ODD_TEMPLATES) | mutated_templates
settings = st.fixed_dictionaries({
    "format": st.sampled_from(["text", "chat", "prompt_response"]),
    "pack": st.booleans(),
    "streaming": st.booleans(),
    "overlong": st.sampled_from(["error", "drop", "truncate"]),
    "loss_on": st.sampled_from(["response", "all"]),
    "chat_template": st.sampled_from([None, CHATML, PLAIN, *ODD_TEMPLATES[:: len(ODD_JINJA) // 4]]),
    "block_documents": st.integers(1, 4),
    "valid_documents": st.integers(1, 4),
})  # fmt: skip


def config_of(train: str, chosen: dict[str, Any]) -> DataSource:
    return DataSource(train=train, sequence_length=LENGTH, **chosen)


def check_row(row: Row) -> None:
    """What the model and the loss rely on."""
    ids, positions, targets = row.input_ids.tolist(), row.position_ids.tolist(), row.targets.tolist()
    assert 1 <= len(ids) == len(positions) == len(targets) <= LENGTH
    assert all(0 <= token < len(TOKENIZER) for token in ids)
    assert positions[0] == 0 and all(b in (0, a + 1) for a, b in pairwise(positions))
    for at, target in enumerate(targets):
        assert target == NO_LABEL or (target == ids[at + 1] and positions[at + 1])
    assert len(row.documents) == positions.count(0) <= row.num_loss_tokens and min(row.documents) >= 1


def outcome(read: Callable[[], list[Row]]) -> bool:
    """Whether there were rows, all of them right, instead of one clear error."""
    try:
        rows = read()
    except DataError as error:
        text = str(error)
        assert "data." in text and "\n" not in text and len(text) < 2000, text
        assert error.__cause__ is None
        return False
    for row in rows:
        check_row(row)
    return True


def originals() -> dict[str, bytes]:
    """The same six documents as bytes of every kind of file."""
    lines = [json.dumps(row) for row in SAMPLES]
    stream = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(SAMPLES), stream)
    return {
        ".jsonl": "\n".join(lines).encode(),
        ".json": f"[{', '.join(lines)}]".encode(),
        ".csv": "\n".join(["text,prompt,response", *(f'one day {n},"who, me",a cat' for n in range(6))]).encode(),
        ".txt": "\n".join(row["text"] for row in SAMPLES).encode(),
        ".parquet": stream.getvalue().to_pybytes(),
    }


def test_mutated_files(tmp_path: Path) -> None:
    """File by file through the entry that a run uses. What is read is compared in `test_reading.py`."""
    values = [
        b'"text"',
        b"3",
        b"null",
        b"[[{}]]",
        b'{"a": 1}',
        b"1e999",
        b'"\\ud800"',
        b"NaN",
        b'{"messages": []}',
        b'a,"',
        b",,,",
    ]
    files = st.one_of(*(
        st.tuples(st.just(suffix), st.just(content) | mutated([content], [*FRAGMENTS, *values]))
        for suffix, content in originals().items()
    ))  # fmt: skip
    read, number = 0, 0

    def check(value: tuple[tuple[str, bytes], dict[str, Any]]) -> None:
        nonlocal read, number
        (suffix, content), chosen = value
        number += 1
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(content)
        config = config_of(str(path), chosen)

        def rows() -> list[Row]:
            batches = islice(TrainingData(config, TOKENIZER, 0, 2).batches(), 4)
            return [row for batch, _ in batches for row in batch] + validation_rows(config, TOKENIZER)

        read += outcome(rows)
        path.unlink()

    feed(st.tuples(files, settings), 450, check)
    assert read > 60  # it is not the first check that refuses everything


def test_documents_of_any_type() -> None:
    """What a reader may hand over, value by value, straight to the encoder."""
    kinds = {"text": texts, "prompt": texts | st.none(), "response": texts, "messages": conversations}
    kinds |= {"tools": st.none(), "system": st.none()}
    mixed = {name: good | good | good | anything for name, good in kinds.items()}

    @st.composite
    def inputs(draw: st.DrawFn) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        chosen, count = draw(settings), draw(st.integers(1, 3))
        names = [column.name for column in columns_of(config_of("memory", chosen))]
        values = draw(st.sampled_from([kinds, mixed]))
        return {name: [draw(values[name]) for _ in range(count)] for name in names}, chosen

    read = 0

    def check(value: tuple[dict[str, list[Any]], dict[str, Any]]) -> None:
        nonlocal read
        documents, chosen = value
        config = config_of("memory", chosen)

        def rows() -> list[Row]:
            samples = Encoder(config, TOKENIZER, "data.train: memory").encode(documents, 1)
            return to_rows(samples, LENGTH, config.pack)

        read += outcome(rows)

    feed(inputs(), 1200, check)
    assert read > 120


def test_odd_templates() -> None:
    """Good conversations, and templates that fail in every way a computation can."""
    chosen = st.fixed_dictionaries(
        {"format": st.just("chat"), "chat_template": templates, "overlong": st.just("truncate")}
    )

    def check(value: tuple[list[Any], dict[str, Any]]) -> None:
        talk, config = value[0], config_of("memory", value[1])

        def rows() -> list[Row]:
            encoder = Encoder(config, TOKENIZER, "data.train: memory")
            return to_rows(encoder.encode({"messages": [talk, TURN]}, 1), LENGTH, True)

        outcome(rows)

    feed(st.tuples(st.lists(messages, max_size=3).map(lambda talk: [*talk, *TURN]), chosen), 400, check)


def test_streams_of_rows_of_any_shape() -> None:
    """Rows that lack keys, have others, or are cut short by whatever the stream raises."""
    rows_of = st.lists(
        st.dictionaries(st.sampled_from(["text", "prompt", "response", "messages", "x"]), anything), max_size=5
    )

    def check(value: tuple[list[dict[str, Any]], dict[str, Any], int]) -> None:
        rows, chosen, skip = value
        config = config_of("memory", chosen)
        documents = datasets.IterableDataset.from_generator(Rows(rows))

        def encoded() -> list[Row]:
            encoder = Encoder(config, TOKENIZER, "data.train: memory")
            blocks = HubDocuments(documents, "data.train: memory", config).blocks(skip, config.block_documents)
            return to_rows(
                [s for first, columns in blocks for s in encoder.encode(columns, first)], LENGTH, config.pack
            )

        outcome(encoded)

    feed(st.tuples(rows_of, settings, st.integers(0, 3)), 400, check)


class Rows:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __call__(self) -> Any:
        yield from self.rows


@pytest.mark.parametrize(
    "name",
    ["~no-such-user/x.jsonl", "x" * 5000, "./" + "y" * 300 + ".jsonl", "a\x00b.txt", "/proc/self/mem", "/dev/null"],
)
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(DataError, match=r"data\.train"):
        validation_rows(DataSource.model_construct(train=name), TOKENIZER)
