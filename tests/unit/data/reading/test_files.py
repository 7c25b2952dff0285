"""Which files a directory stands for: hidden ones, links, compressed copies, splits, saved data sets, clones of the hub."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from taid_ray.config.data import DataSource
from taid_ray.config.paths import with_absolute_paths
from taid_ray.config.schema import DistillConfig
from taid_ray.data.documents import open_documents
from taid_ray.errors import DataError


def put(root: Path, *names: str) -> Path:
    """Files below `root`, each with one row that holds its name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name}).encode() + b"\n"
        path.write_bytes(gzip.compress(row) if name.endswith(".gz") else row)
    return root


def read(path: Path, which: Any = "train", **settings: Any) -> tuple[list[str], str]:
    """The texts in their order, and all that is said of them."""
    documents = open_documents(DataSource(**({"train": str(path), which: str(path)} | settings)), which)
    return [text for _, block in documents.blocks(0, 3) for text in block["text"]], "\n".join(documents.description())


def refused(path: Path, which: Any = "train", **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, which, **settings)
    return str(caught.value)


def test_hidden_files_are_left_out_and_links_followed(tmp_path: Path) -> None:
    """Fault 10. The order is that of the paths, part by part."""
    root = put(
        tmp_path / ".data", "b/1.jsonl", "b.jsonl", "a.jsonl", "._a.jsonl", ".git/x.jsonl", "b/.x/y.jsonl", "notes.md"
    )
    put(tmp_path / "elsewhere", "shard/z.jsonl", "one.jsonl")
    (root / "linked").symlink_to(tmp_path / "elsewhere/shard")
    (root / "c.jsonl").symlink_to(tmp_path / "elsewhere/one.jsonl")
    (root / "b/up").symlink_to(root)
    (tmp_path / "elsewhere/shard/round").symlink_to(root / "b")
    (root / "gone.jsonl").symlink_to(tmp_path / "gone")
    found, said = read(root)
    assert found == ["a.jsonl", "b/1.jsonl", "b.jsonl", "one.jsonl", "shard/z.jsonl"]
    assert "5 files of the kind json" in said and "left out: ._a.jsonl (hidden), .git (hidden), b/.x (hidden)" in said
    assert "b/up (a link to a directory around it)" in said and "and 4 more" in said


def test_compressed_files_are_read_unless_they_are_copies(tmp_path: Path) -> None:
    found, said = read(put(tmp_path, "a.jsonl", "a.jsonl.gz", "b.jsonl.gz", "c.parquet.gz"))
    assert found == ["a.jsonl", "b.jsonl.gz"]
    assert "a.jsonl.gz (the file beside it is read)" in said and "c.parquet.gz (no data file)" in said


def test_descriptions_and_papers_are_no_data(tmp_path: Path) -> None:
    root = put(
        tmp_path, "data/x.jsonl", "dataset_infos.json", "LICENSE.txt", "README.md", "cache-1.arrow", "more.ndjson"
    )
    found, said = read(root)
    assert found == ["data/x.jsonl", "more.ndjson"]
    assert "LICENSE.txt (no data file)" in said and "cache-1.arrow (the others are json files)" in said
    assert "mixes json and text files" in refused(put(tmp_path, "words.txt"))


SPLITS: list[tuple[list[str], str, list[str] | str]] = [
    (["train.jsonl", "test.jsonl", "validation.jsonl"], "train", ["train.jsonl"]),
    (["train.jsonl", "test.jsonl", "validation.jsonl"], "test", ["test.jsonl"]),
    (["train.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
    (["train.jsonl", "eval.jsonl"], "evaluation", ["eval.jsonl"]),
    (["train.jsonl", "test.jsonl"], "validation", "no split 'validation' (it has: test, train). Set data.split"),
    (["train/a.jsonl", "train/test.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl", "train/test.jsonl"]),
    (["x-train-00000-of-00002.jsonl", "x-train-00001-of-00002.jsonl", "x_val.jsonl"], "train",
     ["x-train-00000-of-00002.jsonl", "x-train-00001-of-00002.jsonl"]),
    (["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"], "train_sft",
     ["data/train_sft-00000-of-00001.jsonl"]),
    (["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"], "train", "(it has: train_gen, train_sft)"),
    (["data/x-train-00000-of-00001.jsonl", "data/x-test-00000-of-00001.jsonl"], "train", ["data/x-train-00000-of-00001.jsonl"]),
    (["train.jsonl", "test.jsonl", "other.jsonl"], "train", ["train.jsonl"]),
    (["books.jsonl", "code.jsonl", "test.jsonl"], "train", ["books.jsonl", "code.jsonl"]),
    # Without names of several splits all is read, as before.
    (["latest.jsonl", "trains.jsonl"], "train", ["latest.jsonl", "trains.jsonl"]),
    (["train_1.jsonl", "other.jsonl"], "train", ["other.jsonl", "train_1.jsonl"]),
    (["test.jsonl"], "train", ["test.jsonl"]),
    (["train_test.jsonl", "more.jsonl"], "train", ["more.jsonl", "train_test.jsonl"]),
    (["data/books-00000-of-00001.jsonl", "data/code-00000-of-00001.jsonl"], "train",
     ["data/books-00000-of-00001.jsonl", "data/code-00000-of-00001.jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "split", "expected"), SPLITS)
def test_splits_by_names(tmp_path: Path, names: list[str], split: str, expected: list[str] | str) -> None:
    root = put(tmp_path, *names)
    if isinstance(expected, str):
        assert expected in refused(root, split=split)
        return
    found, said = read(root, split=split)
    assert found == expected
    left = set(names) - set(expected)
    assert all(name in said for name in left) and ("left out" in said) == bool(left)


def test_validation_data_have_a_split_of_their_own(tmp_path: Path) -> None:
    root = put(tmp_path, "train.jsonl", "validation.jsonl", "test.jsonl")
    assert read(root, "valid")[0] == ["validation.jsonl"]
    assert read(root, "valid", valid_split="test")[0] == ["test.jsonl"]
    assert "Set data.valid_split" in refused(root, "valid", valid_split="unseen")
    assert "data.split: 'train[:10%]' is a part" in refused(root, split="train[:10%]")


def test_what_save_to_disk_writes_is_read(tmp_path: Path) -> None:
    """Fault 23."""
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {n}" for n in range(4)]}) for name in ("train", "test")
    }
    parts["train"].save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one")[0] == [f"train {n}" for n in range(4)]
    assert "is a saved Dataset" in read(tmp_path / "one")[1]
    assert read(tmp_path / "two")[0] == [f"train {n}" for n in range(4)]
    found, said = read(tmp_path / "two", split="test")
    assert found == [f"test {n}" for n in range(4)]
    assert "a saved DatasetDict with the splits train, test; 'test' is read (data.split)" in said
    assert "has no split 'validation' (it has: train, test)" in refused(tmp_path / "two", "valid")
    (tmp_path / "one/state.json").write_text("{}")
    assert "does not describe a saved data set" in refused(tmp_path / "one")


HEAD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/tr-*.jsonl
  - split: test
    path: data/te.jsonl
- config_name: fr
  data_files: "fr/*"
---
# A data set
"""


def test_a_clone_of_a_hub_data_set_is_read_as_its_readme_says(tmp_path: Path) -> None:
    root = put(tmp_path, "data/tr-1.jsonl", "data/tr-0.jsonl", "data/te.jsonl", "data/other.jsonl", "fr/x.jsonl")
    (root / "README.md").write_text(HEAD)
    assert read(root)[0] == ["data/tr-0.jsonl", "data/tr-1.jsonl"]
    found, said = read(root, split="test")
    assert found == ["data/te.jsonl"] and "subset 'default', splits train, test; 'test' is read (data.split)" in said
    assert read(root, subset="fr")[0] == ["fr/x.jsonl"]
    assert "Available: ['default', 'fr']" in refused(root, subset="de")
    assert "has no split 'validation' (it has: train)" in refused(root, subset="fr", split="validation")
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    assert len(read(root)[0]) == 5  # no name of a split among them
    (root / "fr/x.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "x.jsonl is a Git LFS pointer" in refused(root)


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    """Fault 11: also with the time stamp of the one before."""
    path = tmp_path / "a.jsonl"
    for content in ("first content", "second content, longer"):
        path.write_text(json.dumps({"text": content}))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert read(path)[0] == read(tmp_path)[0] == [content]


def test_what_a_link_leads_to_a_second_time_is_read_once(tmp_path: Path) -> None:
    root = put(tmp_path / "d", "v1/a.jsonl", "v1/b.jsonl")
    (root / "latest").symlink_to("v1")
    (root / "a_link.jsonl").symlink_to("v1/b.jsonl")
    texts, said = read(root)
    assert texts == ["v1/a.jsonl", "v1/b.jsonl"]
    assert "a_link.jsonl (the same file as v1/b.jsonl), latest/a.jsonl (the same file as v1/a.jsonl)" in said


def test_data_of_the_name_of_a_description_are_read_where_there_are_no_others(tmp_path: Path) -> None:
    assert read(put(tmp_path / "one", "state.json"))[0] == ["state.json"]
    assert read(put(tmp_path / "two", "state.json", "a.json"))[0] == ["a.json"]


def test_a_licence_in_a_folder_is_no_data(tmp_path: Path) -> None:
    root = put(tmp_path, "a.jsonl")
    (root / "sub").mkdir()
    (root / "sub" / "LICENSE.txt").write_text("As is.")
    assert read(root)[0] == ["a.jsonl"]


def test_a_column_of_the_prompt_may_be_absent_from_a_file(tmp_path: Path) -> None:
    rows = [{"instruction": "add", "input": "1", "output": "2"}], [{"instruction": "sing", "output": "la"}]
    for name, found in zip("ba", rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    config = DataSource(
        train=str(tmp_path),
        format="prompt_response",
        prompt_columns=["instruction", "input"],
        response_column="output",
    )
    ((_, block),) = open_documents(config, "train").blocks(0, 9)
    assert block["input"] == [None, "1"]
    with pytest.raises(DataError, match=r"has no column 'inputs' \(it has: instruction, output, input\)"):
        open_documents(config.model_copy(update={"prompt_columns": ["instruction", "inputs"]}), "train")


def test_a_pattern_stands_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fixed part is taken literally; the files are chosen and sorted as those of a directory."""
    root = put(
        tmp_path / "x[1]",
        "c/b.jsonl",
        "c/a.jsonl",
        "c/.h.jsonl",
        "c/a.jsonl.gz",
        "c/d/e.jsonl",
        "c/words.txt",
        "c/d[2].jsonl",
    )
    (root / "c/gone.jsonl").symlink_to(tmp_path / "gone")
    found, said = read(root / "c/*.jsonl")
    assert found == ["c/a.jsonl", "c/b.jsonl", "c/d[2].jsonl"]
    assert f"data.train: {root}/c/*.jsonl: 3 files of the kind json (a.jsonl, b.jsonl, d[2].jsonl)" in said
    assert "left out: gone.jsonl (a link to nothing)" in said
    assert read(root / "**/[ae].jsonl*")[0] == ["c/a.jsonl", "c/d/e.jsonl"]
    assert "a.jsonl.gz (the file beside it is read)" in read(root / "c/a*")[1]
    assert "d (a directory)" in read(root / "c/*[!t]")[1] and "a directory" not in read(root / "**/*.jsonl")[1]
    assert read(root / "c/d[2].jsonl")[0] == ["c/d[2].jsonl"]  # a path that exists
    assert "mixes json and text files" in refused(root / "c/*")
    put(root, "s/train-1.jsonl", "s/test-1.jsonl")
    assert read(root / "s/*.jsonl")[0] == ["s/train-1.jsonl"]
    assert read(root / "s/*.jsonl", split="test")[0] == ["s/test-1.jsonl"]
    message = f"data.valid: {root}/c/z*.jsonl: no file matches this pattern, of which {root}/c exists. Correct it"
    assert refused(root / "c/z*.jsonl", "valid", train=str(root / "s")).startswith(message)
    monkeypatch.chdir(root)
    config = DistillConfig(
        teacher={"model": "t"},
        student={"model": "s"},
        data={"train": "c/*.jsonl", "valid": "org/name"},
        train={"steps": 1},
    )
    made = with_absolute_paths(config).data
    assert (made.train, made.valid) == (f"{root}/c/*.jsonl", "org/name")
    assert read(Path("[c]/*.jsonl"))[0] == found


def test_files_with_a_header_are_not_read_on_for_a_column(tmp_path: Path) -> None:
    """What is wrong further on is not met: the first row tells the columns of all."""
    (tmp_path / "a.csv").write_text('instruction,output\nadd,2\nsing,"la\n')
    (tmp_path / "b.csv").write_text('instruction,input,output\nadd,1,2\nsing,"la\n')
    columns: dict[str, Any] = {"prompt_columns": ["instruction", "input"], "response_column": "output"}
    open_documents(DataSource(train=str(tmp_path), format="prompt_response", **columns), "train")
    assert "a.csv has no column 'text' (it has: instruction, output)" in refused(tmp_path)
