"""Data: what is read, what becomes of it as tokens and loss positions, and the one order of rows."""

import json
import sys
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from taid_ray.config.data import DataSource
from taid_ray.data.batch import NO_LABEL, Row
from taid_ray.data.cursor import read_cursor
from taid_ray.data.dataset import TrainingData, open_validation, validation_rows
from taid_ray.data.turns import inside
from taid_ray.driver.preflight import check_data as check_opened_data
from taid_ray.errors import DataError
from taid_ray.student.spec import DataCheck
from tests.support.paths import ROOT, SHARED

STORIES = ROOT / "taid_ray/quickstart/stories260k"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends in EOS unless a response is asked for, as Phi-3's does.
PHI = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
FORGETFUL = "{% for m in messages %}[{{ m.role if loop.last else '?' }}]{{ m.content }}{% endfor %}"


def build_tokenizer(bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with real merges; `bos` makes it prepend BOS by itself."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["the cat sat on the mat and the dog said hello user assistant"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(text, trainer)
    if bos:
        model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", chat_template=template)


def check_data(config: DataSource, tokenizer: Any) -> DataCheck:
    opened, held_out = TrainingData(config, tokenizer, 0, 1), open_validation(config)
    return check_opened_data(config, [opened], tokenizer, sys.maxsize, [held_out])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(template=CHATML)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(train: str, **settings: Any) -> DataSource:
    return DataSource(train=train, **({"sequence_length": 64, "block_documents": 8, "valid_documents": 4} | settings))


def stories(path: Path, count: int = 41) -> str:
    return write(
        path, [{"text": f"story {i}: the cat sat on the mat" + " and the dog" * (i % 9)} for i in range(count)]
    )


def all_training_rows(config: DataSource, tokenizer: Any) -> list[Row]:
    training = TrainingData(config, tokenizer, seed=0, batch_size=1)
    return [batch[0] for batch, _ in islice(training.batches(), training.rows_per_epoch())]


def texts_of(rows: list[Row], tokenizer: Any) -> list[str]:
    """The samples of the rows as text."""
    texts = []
    for row in rows:
        starts = [i for i, p in enumerate(row.position_ids) if p == 0] + [len(row.input_ids)]
        texts += [tokenizer.decode(row.input_ids[a:b]) for a, b in pairwise(starts)]
    return texts


def learnt(row: Row, tokenizer: Any) -> str:
    """The targets of a row as text."""
    return str(tokenizer.decode([t for t in row.targets if t != NO_LABEL]))


# --- order ---------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_document_once_and_never_a_held_out_one(tmp_path: Path, tokenizer: Any) -> None:
    config = config_of(stories(tmp_path / "d.jsonl"))
    rows = all_training_rows(config, tokenizer)
    assert len(rows) < 37  # packed
    held_out = texts_of(validation_rows(config, tokenizer), tokenizer)
    trained = texts_of(rows, tokenizer)
    expected = ["story {}: the cat sat on the mat{}</s>".format(i, " and the dog" * (i % 9)) for i in range(41)]
    assert sorted(trained) == sorted(expected[4:])
    assert sorted(held_out) == sorted(expected[:4])


def test_with_data_valid_nothing_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    valid = write(tmp_path / "v.jsonl", [{"text": f"validation {i}"} for i in range(10)])
    config = config_of(stories(tmp_path / "d.jsonl"), valid=valid)
    assert len(texts_of(all_training_rows(config, tokenizer), tokenizer)) == 41
    assert len(texts_of(validation_rows(config, tokenizer), tokenizer)) == 4  # capped at valid_documents


def test_the_order_depends_on_seed_and_epoch_only(tmp_path: Path, tokenizer: Any) -> None:
    config = config_of(stories(tmp_path / "d.jsonl"))

    def first(count: int, **arguments: Any) -> list[Row]:
        training = TrainingData(config, tokenizer, **arguments)
        rows = [row for batch, _ in islice(training.batches(), count) for row in batch]
        assert all(len(batch) == arguments["batch_size"] for batch, _ in islice(training.batches(), 3))
        return rows

    rows = first(24, seed=1, batch_size=2)
    assert rows == first(24, seed=1, batch_size=2) == first(16, seed=1, batch_size=3)
    assert rows != first(24, seed=2, batch_size=2)
    epoch = TrainingData(config, tokenizer, 1, 2).rows_per_epoch()
    assert rows[:epoch] != rows[epoch : 2 * epoch]
    one, two = (sorted(texts_of(part, tokenizer)) for part in (rows[:epoch], rows[epoch : 2 * epoch]))
    assert one == two


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_cursor_continues_exactly(tmp_path: Path, tokenizer: Any, streaming: bool, batch_size: int) -> None:
    config = config_of(stories(tmp_path / "d.jsonl"), streaming=streaming)
    whole = list(islice(TrainingData(config, tokenizer, 3, batch_size).batches(), 60))
    for at in range(0, 60, 7):
        cursor = read_cursor(json.loads(json.dumps(asdict(whole[at][1]))))
        again = list(islice(TrainingData(config, tokenizer, 3, batch_size).batches(cursor), 59 - at))
        assert again == whole[at + 1 :]
    last = whole[-1][1]
    assert last.epoch >= 2
    assert last.samples == sum(row.num_samples for batch, _ in whole for row in batch)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt", "parquet", "csv"])
def test_streaming_gives_the_same_batches(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    path = tmp_path / f"d.{suffix}"
    rows = [{"text": f"line {i}"} for i in range(30)]
    if suffix == "txt":
        path.write_text("\n\n".join(row["text"] for row in rows) + "\n  \n")
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        write(path, rows)
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{suffix}")(str(path))
    plain, streamed = (config_of(str(path), streaming=flag) for flag in (False, True))
    first, second = (list(islice(TrainingData(c, tokenizer, 0, 4).batches(), 12)) for c in (plain, streamed))
    assert first == second
    assert validation_rows(plain, tokenizer) == validation_rows(streamed, tokenizer)
    assert len(texts_of(all_training_rows(plain, tokenizer), tokenizer)) == 26
    assert TrainingData(streamed, tokenizer, 0, 1).num_documents is None


def test_a_directory_is_read_in_order_of_names(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "corpus").mkdir()
    for part in (1, 0):
        write(tmp_path / f"corpus/part{part}.jsonl", [{"text": f"part {part} row {i}"} for i in range(3)])
    (tmp_path / "corpus/README.md").write_text("not data")
    rows = validation_rows(config_of(str(tmp_path / "corpus"), pack=False), tokenizer)
    assert texts_of(rows, tokenizer)[2:] == ["part 0 row 2</s>", "part 1 row 0</s>"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["c++ (a) [b] {c}", "what? [!a-z]*", "a[", "**"])
def test_a_path_is_no_pattern(tmp_path: Path, tokenizer: Any, name: str, streaming: bool) -> None:
    (tmp_path / "neighbour").mkdir()
    write(tmp_path / "neighbour/d [1].jsonl", [{"text": "another's"} for _ in range(9)])
    (tmp_path / name).mkdir()
    path = write(tmp_path / name / "d [1].jsonl", [{"text": f"row {i}"} for i in range(9)])
    rows = validation_rows(config_of(path, pack=False, streaming=streaming), tokenizer)
    assert texts_of(rows, tokenizer) == [f"row {i}</s>" for i in range(4)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_knows_the_documents_it_is_made_of(tmp_path: Path, tokenizer: Any, streaming: bool) -> None:
    """Counted from 1 in the file, held-out and dropped ones included; a long document stands there once per piece."""
    texts = [f"story {i}" + " and the dog" * (i % 31) for i in range(41)]
    texts[20] = ""
    path = write(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    config = config_of(path, sequence_length=32, streaming=streaming)
    rows = all_training_rows(config, tokenizer)
    assert {document for row in rows for document in row.documents} == {*range(5, 42)} - {21}
    assert all(len(row.documents) == row.num_samples for row in rows)
    for row in rows:
        samples = texts_of([row], tokenizer)
        assert all(s in texts[d - 1] + "</s>" for d, s in zip(row.documents, samples, strict=True))
    assert {d for row in validation_rows(config, tokenizer) for d in row.documents} == {1, 2, 3, 4}


def test_a_chat_row_knows_its_documents_too(tmp_path: Path, tokenizer: Any) -> None:
    """A row that is dropped shifts no number."""
    rows = [{"prompt": "the", "response": f"cat{n}" + " xyz" * n} for n in (1, 40, 2, 3)]
    path = write(tmp_path / "d.jsonl", rows)
    config = config_of(path, format="prompt_response", overlong="drop", pack=False)
    assert [row.documents for row in validation_rows(config, tokenizer)] == [(1,), (3,), (4,)]


# --- encoding ------------------------------------------------------------------------------------------------------


def test_text_ends_in_one_eos_and_begins_with_the_tokenizers_own_bos(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"text": "the cat"}, {"text": "the dog</s>"}])
    config = config_of(path, pack=False)
    assert texts_of(validation_rows(config, build_tokenizer(bos=True)), build_tokenizer()) == [
        "<s>the cat</s>",
        "<s>the dog</s>",
    ]
    no_eos = build_tokenizer()
    no_eos.eos_token = None
    assert texts_of(validation_rows(config, no_eos), no_eos)[0] == "the cat"


def test_long_text_is_cut(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "d.jsonl", [{"text": "xyzqv" * 10}])
    rows = validation_rows(config_of(path, sequence_length=16), tokenizer)
    assert [len(row.input_ids) for row in rows] == [16, 16, 16, 3]
    assert sum(row.num_loss_tokens for row in rows) == 51 - 4


CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the cat sat"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "the dog é sat"},
]


@pytest.mark.parametrize(("template", "closing"), [(CHATML, ""), (PHI, "</s>")])
def test_chat_learns_what_the_assistant_says(tmp_path: Path, tokenizer: Any, template: str, closing: str) -> None:
    path = write(tmp_path / "d.jsonl", [{"messages": CHAT}])
    config = config_of(path, format="chat", sequence_length=256, chat_template=template)
    (row,) = validation_rows(config, tokenizer)
    full = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert row.input_ids.tolist() == tokenizer(full, add_special_tokens=False)["input_ids"]
    assert learnt(row, tokenizer) == "the cat sat<|im_end|>\nthe dog é sat<|im_end|>\n" + closing
    (row,) = validation_rows(config.model_copy(update={"loss_on": "all"}), tokenizer)
    assert row.targets.tolist() == [*row.input_ids[1:], NO_LABEL]


def test_tokens_inside_spans() -> None:
    offsets = [(0, 3), (3, 6), (5, 5), (6, 6), (6, 8), (8, 9), (9, 12), (0, 0)]
    assert inside(offsets, [(5, 8), (11, 20)]) == [False, True, True, True, True, False, True, False]
    assert inside(offsets, []) == [False] * 8


def test_a_template_that_renders_a_prefix_differently_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "d.jsonl", [{"messages": CHAT}])
    config = config_of(path, format="chat", sequence_length=256, chat_template=FORGETFUL)
    with pytest.raises(
        DataError, match="row 1: the chat template renders the conversation up to message 5 differently"
    ):
        validation_rows(config, tokenizer)


def test_prompt_and_response_without_a_template(tmp_path: Path) -> None:
    rows = [{"question": "the cat", "context": c, "answer": " sat on"} for c in ("", None, "hello")]
    config = config_of(
        write(tmp_path / "d.jsonl", rows),
        format="prompt_response",
        prompt_columns=["question", "context"],
        response_column="answer",
        pack=False,
    )
    bos = build_tokenizer(bos=True)
    found = validation_rows(config, bos)
    assert texts_of(found, bos) == ["<s>the cat\n sat on</s>"] * 2 + ["<s>the cat\n\nhello\n sat on</s>"]
    assert [learnt(row, bos) for row in found] == [" sat on</s>"] * 3


def test_prompt_and_response_with_a_template_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(CHATML)
    path = write(tmp_path / "d.jsonl", [{"prompt": "hello", "response": "the cat"}])
    settings = {"format": "prompt_response", "chat_template": str(tmp_path / "template.jinja")}
    (row,) = validation_rows(config_of(path, **settings), build_tokenizer(bos=True))
    assert texts_of([row], build_tokenizer()) == [
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>\n"
    ]
    assert learnt(row, build_tokenizer()) == "the cat<|im_end|>\n"


def test_overlong_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "the", "response": f"cat{n}" + " xyz" * n} for n in (1, 40, 2)] + [
        {"prompt": "qxz" * 40, "response": "cat"}
    ]
    config = config_of(write(tmp_path / "d.jsonl", rows), format="prompt_response", sequence_length=80)
    with pytest.raises(
        DataError, match=r"data.train: .*d.jsonl: row 2 has \d+ tokens.*= 80.*overlong: drop or truncate"
    ):
        validation_rows(config, tokenizer)
    extra = {"valid": config.train, "pack": False}
    found = check_data(config.model_copy(update=extra | {"overlong": "drop"}), tokenizer)
    assert (found.rows, found.dropped, found.truncated, found.valid_rows) == (2, 2, 0, 2)
    found = check_data(config.model_copy(update=extra | {"overlong": "truncate"}), tokenizer)
    assert (found.rows, found.dropped, found.truncated) == (3, 1, 1)


# --- what is refused -----------------------------------------------------------------------------------------------

BAD_FILES = [
    ("d.xlsx", b"x", {}, "files of the kind '.xlsx' cannot be read"),
    ("d.jsonl", b"", {}, "is empty"),
    ("d.txt", b"\n  \n\n", {}, "is empty"),
    ("d.json", b"[]", {}, "is empty|cannot be read"),
    ("d.jsonl", b'{"text": "a"\n', {}, "cannot be read as json.*line 1, column 13: Expecting"),
    ("d.parquet", b"not parquet", {}, "cannot be read as parquet"),
    ("d.txt", b"\xff\xfebad\n", {}, "cannot be read as text.*utf-8"),
    ("d.csv", b"a,b\n1,2\n", {}, r"no column 'text' \(it has: a, b\)\. Set data.text_column"),
    ("d.jsonl", b'{"text": "a"}\n{"text": 3}\n', {}, "row 2 of column 'text' holds int 3 instead of text"),
    ("d.jsonl", b'{"text": "a"}\n{"text": null, "b": 1}\n', {}, "row 2 of column 'text' holds NoneType None"),
    ("d.jsonl", b'{"text": ""}\n', {}, "no loss position: none of 1 documents"),
    ("d.jsonl", b'{"prompt": "a"}\n', {"format": "prompt_response"}, "no column 'response'.*data.response_column"),
    (
        "d.jsonl",
        b'{"messages": "hi"}\n',
        {"format": "chat"},
        "row 1 of column 'messages' holds str 'hi' instead of a list",
    ),
    ("d.jsonl", b'{"messages": [{"from": "a"}]}\n', {"format": "chat"}, "message without text under 'content'"),
    ("d.jsonl", b'{"messages": [{"content": "a"}]}\n', {"format": "chat"}, "message without text under 'role'"),
    (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}]}\n',
        {"format": "chat"},
        "row 1 has no loss position.*data.loss_on: all",
    ),
    (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}]}\n',
        {"format": "chat", "chat_template": "{{ raise_exception('odd') }}"},
        "row 1: the chat template fails .*odd",
    ),
    (
        "d.jsonl",
        b'{"messages": []}\n',
        {"format": "chat", "chat_template": "no/such.jinja"},
        "data.chat_template: 'no/such",
    ),
    (
        "d.jsonl",
        b'{"messages": []}\n',
        {"format": "chat", "chat_template": "no\0such"},
        "data.chat_template: 'no.*neither Jinja source nor a readable file",
    ),
    (
        "d.jsonl",
        b'{"prompt": "a", "response": "b"}\n',
        {"format": "prompt_response", "chat_template": "{{ 1 / 0 }}"},
        "row 1: the chat template fails .*ZeroDivisionError",
    ),
    (
        "d.jsonl",
        b'{"prompt": "a", "response": "b"}\n',
        {"format": "prompt_response", "chat_template": CHATML + "{{ '\\ud800' }}", "overlong": "truncate"},
        "row 1.*(half a character|differently)",
    ),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "content", "settings", "message"), BAD_FILES)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, settings: Any, message: str, streaming: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    config = config_of(str(tmp_path / name), valid=str(tmp_path / name), streaming=streaming, **settings)
    with pytest.raises(DataError, match=message) as caught:
        check_data(config, tokenizer)
    assert "data." in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_missing_files_and_directories(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed/a.jsonl", [{"text": "a"}])
    (tmp_path / "mixed/b.txt").write_text("b")
    good = stories(tmp_path / "d.jsonl")
    for name, message in [
        ("nowhere.jsonl", "data.train: nowhere.jsonl: no such file or directory"),
        ("./nowhere", "no such file"),
        (str(tmp_path / "none"), "holds no data files"),
        (str(tmp_path / "mixed"), "mixes json and text files"),
        ("nobody/no-such-dataset", "cannot be loaded from the hub"),
    ]:
        with pytest.raises(DataError, match=message):
            check_data(config_of(name), tokenizer)
    with pytest.raises(DataError, match=r"data\.valid: nowhere\.txt: no such file"):
        check_data(config_of(good, valid="nowhere.txt"), tokenizer)


def test_all_documents_held_out(tmp_path: Path, tokenizer: Any) -> None:
    config = config_of(stories(tmp_path / "d.jsonl", 5), valid_documents=5)
    with pytest.raises(DataError, match=r"has 5 documents and the first data.valid_documents = 5 are held out"):
        check_data(config, tokenizer)


def test_chat_without_any_template(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match=r"has none. Set data.chat_template"):
        check_data(config_of(path, format="chat"), build_tokenizer())


def test_training_on_nothing_ends(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "the", "response": "xyz" * 50}] * 3
    valid = write(tmp_path / "v.jsonl", [{"prompt": "the", "response": "cat"}])
    config = config_of(
        write(tmp_path / "d.jsonl", rows), valid=valid, format="prompt_response", overlong="drop", sequence_length=40
    )
    with pytest.raises(DataError, match=r"no loss position: none of \d documents gave a sample"):
        check_data(config, tokenizer)


# --- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not STORIES.is_dir(), reason="the bundled model is absent")
def test_the_bundled_tokenizer_brings_bos_and_eos(tmp_path: Path) -> None:
    llama = AutoTokenizer.from_pretrained(STORIES)
    (row,) = validation_rows(config_of(write(tmp_path / "d.jsonl", [{"text": "Once upon a time"}])), llama)
    assert row.input_ids[0] == llama.bos_token_id
    assert row.input_ids[-1] == llama.eos_token_id
    assert row.input_ids.tolist().count(llama.eos_token_id) == 1


@needs_shared
@pytest.mark.parametrize(("name", "templated"), [("qwen1.5", True), ("gpt2", False)])
def test_real_instructions(name: str, templated: bool) -> None:
    path = SHARED / "instruct/dolly_train_clean.jsonl"
    real = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    config = DataSource(
        train=str(path),
        format="prompt_response",
        prompt_columns=["instruction", "input"],
        response_column="output",
        sequence_length=512,
        overlong="truncate",
        valid_documents=50,
        block_documents=256,
        pack=False,
    )
    with path.open(encoding="utf-8") as lines:
        first = [json.loads(line) for line in islice(lines, 50)]
    end = "<|im_end|>\n" if templated else "<|endoftext|>"
    for document, row in zip(first, validation_rows(config, real), strict=True):
        if len(row.input_ids) < 512:
            assert learnt(row, real) == document["output"] + end
    training = TrainingData(config.model_copy(update={"pack": True}), real, 0, 1)
    rows = training.first_block()
    assert training.num_documents == 4277
    assert len(rows) * 512 * 0.9 > sum(row.num_loss_tokens for row in rows) > 0
    assert len(rows) < 256


@needs_shared
def test_real_text_lines(tokenizer: Any) -> None:
    config = DataSource(train=str(SHARED / "text/wikitext2_valid.txt"), sequence_length=256, streaming=True)
    rows = next(TrainingData(config, tokenizer, 0, 16).batches())[0]
    assert all(0 < row.num_loss_tokens < 256 and len(row.input_ids) <= 256 for row in rows)
