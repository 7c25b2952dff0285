"""Several sources of training data in the configuration."""

from typing import Any

import pytest

from taid_ray.config.paths import flat, with_absolute_paths
from taid_ray.config.schema import DistillConfig, build_config
from taid_ray.errors import ConfigError
from taid_ray.run.directory import changed_keys

A, B = {"path": "a.jsonl"}, {"path": "corpus/b.parquet"}


def config_of(train: Any, **data: Any) -> DistillConfig:
    models = {"teacher": {"model": "t"}, "student": {"model": "s"}}
    return build_config(models | {"data": {"train": train} | data, "train": {"steps": 3}})


def test_a_name_is_the_only_source() -> None:
    config = config_of("a.jsonl", valid="v.jsonl", format="chat")
    (source,) = config.data.sources
    assert (source.train, source.valid, source.format, source.label) == ("a.jsonl", "v.jsonl", "chat", "")
    assert (source.key, source.valid_key) == ("data.train", "data.valid")
    assert config.data.validations == (source,) and config.data.names == ["a.jsonl", "v.jsonl"]


def test_a_source_has_its_own_keys_and_the_others_of_the_section() -> None:
    train = [A | {"weight": 2, "format": "chat", "valid": "va.jsonl"}, B | {"weight": 1, "valid_documents": 5}]
    config = config_of(train, valid_documents=7, sequence_length=99, text_column="body")
    first, second = config.data.sources
    assert (first.train, first.label, first.format, first.valid) == ("a.jsonl", "a", "chat", "va.jsonl")
    assert (first.valid_key, first.valid_documents, first.sequence_length) == ("data.train[0].valid", 7, 99)
    assert (second.train, second.label, second.format, second.valid) == ("corpus/b.parquet", "b", "text", None)
    assert (second.key, second.valid_documents, second.text_column) == ("data.train[1].path", 5, "body")
    assert config.data.validations == config.data.sources
    assert build_config(config.model_dump(mode="json")) == config


def test_one_validation_for_all_sources() -> None:
    config = config_of(["a.jsonl", "b.jsonl"], valid="v.jsonl")
    assert [source.valid for source in config.data.sources] == ["v.jsonl"] * 2  # so none of their documents is held out
    (held_out,) = config.data.validations
    assert (held_out.valid, held_out.label, held_out.valid_key) == ("v.jsonl", "", "data.valid")


@pytest.mark.parametrize(
    ("train", "data", "message"),
    [
        ([], {}, r"data\.train: must not be empty"),
        ([A, 7], {}, r"data\.train\[1\]: must be a section of keys \(found 7\)"),
        ([A, {"weight": 1}], {}, r"data\.train\[1\]\.path: missing"),
        ([A, B | {"wieght": 1}], {}, r"data\.train\[1\]\.wieght: unknown key .*Did you mean data\.train\[\]\.weight\?"),
        ([A, B | {"weight": 0}], {}, r"data\.train\[1\]\.weight: must be greater than 0 \(found 0\)"),
        ([A, B | {"rows": 0}], {}, r"data\.train\[1\]\.rows: must be greater than or equal to 1 \(found 0\)"),
        (
            [A | {"rows": 1}, B | {"weight": 1, "rows": 2}],
            {},
            r"data\.train\[1\]: give weight or rows, not both \(found 1 and 2\)",
        ),
        (
            [A, B | {"weight": 1}],
            {},
            r"data\.train\[0\]: has neither weight nor rows, but data\.train\[1\] has a weight",
        ),
        ([A, {"path": "x/a.csv"}], {}, r"data\.train: 2 sources are called 'a'; give each a name"),
        ([A, B | {"turns": "last"}], {"loss_on": "all"}, r"data\.train\[1\]: turns: last goes with loss_on: response"),
        ([A, B | {"valid": "w"}], {"valid": "v"}, r"data\.train\[1\]\.valid is 'w', but data\.valid \('v'\)"),
        ([A, B], {"order": "blocks"}, r"data\.train: several sources .*\(found data\.order: blocks\)"),
        ([A, B], {"streaming": True}, r"data\.train: several sources .*of data\.streaming"),
    ],
)
def test_what_does_not_fit_is_refused(train: Any, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(train, **data)


def test_a_resumed_run_may_move_paths_but_not_change_the_mixture() -> None:
    before = config_of([A | {"weight": 2}, B | {"weight": 1}])
    moved = config_of([A | {"weight": 2}, {"path": "elsewhere/b.parquet", "weight": 1}])
    assert changed_keys(before, moved, may_move=True) == []
    assert changed_keys(before, moved) == ['data.train[1].path (was "corpus/b.parquet", now "elsewhere/b.parquet")']
    heavier = config_of([A | {"weight": 3}, B | {"weight": 1}])
    assert changed_keys(before, heavier, may_move=True) == ["data.train[0].weight (was 2.0, now 3.0)"]


def test_paths_of_sources_become_absolute(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    found = with_absolute_paths(config_of([A, {"path": "corpus/*.jsonl", "name": "c"}, "org/data"])).data.sources
    assert [source.train for source in found] == [f"{tmp_path}/a.jsonl", f"{tmp_path}/corpus/*.jsonl", "org/data"]


def test_flat_names_what_is_in_lists_of_mappings() -> None:
    assert flat({"a": [{"b": 1}, {"c": {"d": 2}}], "e": [1, 2], "f": []}) == {
        "a[0].b": 1,
        "a[1].c.d": 2,
        "e": [1, 2],
        "f": [],
    }
