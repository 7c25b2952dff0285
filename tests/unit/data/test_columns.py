"""The columns that each format reads."""

import pytest

from taid_ray.config.data import DataConfig
from taid_ray.data.columns import Column, columns_of


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"format": "text"}, [Column(("text",), "data.text_column")]),
        (
            {"format": "chat"},
            [
                Column(("messages", "conversations", "conversation"), "data.messages_column"),
                Column(("tools",), "data.format", required=False),
                Column(("system",), "data.format", required=False),
            ],
        ),
        (
            {"format": "prompt_response", "prompt_columns": ["q", "context", "q"]},
            [
                Column(("q",), "data.prompt_columns"),
                Column(("context",), "data.prompt_columns"),
                Column(("response", "completion"), "data.response_column"),
            ],
        ),
    ],
)
def test_columns_of_each_format(settings: dict[str, str], expected: list[Column]) -> None:
    assert columns_of(DataConfig(train="x", **settings)) == expected


def test_a_column_that_is_named_has_no_other_name() -> None:
    assert columns_of(DataConfig(train="x", format="chat", messages_column="turns"))[0].names == ("turns",)
