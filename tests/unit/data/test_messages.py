"""Shapes of conversations and tools in the data, and how they are understood."""

import json
from datetime import date
from typing import Any

import pytest

from taid_ray.data.messages import Understood, read_messages, read_tools, without_none
from taid_ray.errors import DataError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def read(value: Any, **options: Any) -> list[dict[str, Any]]:
    return read_messages(value, "here", Understood(), **options)


@pytest.mark.parametrize(
    "value",
    [
        [USER, ANSWER],
        json.dumps([USER, ANSWER]),
        [json.dumps(USER), json.dumps(ANSWER)],
        {"role": ["user", "assistant"], "content": ["hi", "yo"], "name": None},
        json.dumps({"from": ["human", "gpt"], "value": ["hi", "yo"]}),
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
        [{"from": "Human ", "value": "hi"}, {"from": "chatgpt", "value": "yo", "role": None}],
        [{"role": "user", "content": [{"type": "text", "text": "h", "image": None}, "i"]}, ANSWER],
        [USER, {"role": "assistant", "content": "yo", "tool_calls": []}],
        [USER, {"role": "bot", "content": "yo", "tool_calls": None, "function_call": None}],
    ],
)
def test_usual_shapes_of_the_same_conversation(value: Any) -> None:
    assert read(value) == [USER, ANSWER]


def test_shapes_and_roles_that_were_read_are_said() -> None:
    understood = Understood()
    read_messages(json.dumps([{"from": "human", "value": ["hi"]}, {"from": "gpt", "value": "yo"}]), "here", understood)
    assert understood.roles == {"human": "user", "gpt": "assistant"}
    assert list(understood.shapes) == [
        "JSON text",
        "content in parts, whose texts were joined",
        "messages with from and value",
    ]
    assert read_messages([USER, ANSWER], "here", plain := Understood()) and plain == Understood()


def test_keys_stay_in_their_order_and_none_goes_at_every_depth() -> None:
    message = {"name": "x", "role": "assistant", "meta": {"a": None, "b": [{"c": None}]}, "content": "yo", "last": 1}
    (found,) = read([message])
    assert list(found) == list(message) and found["meta"] == {"b": [{}]}
    assert without_none({"a": {"b": None, "c": [1, None]}}) == {"a": {"c": [1, None]}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": "", "tool_calls": [json.dumps(CALL)]},
        {"role": "assistant", "tool_calls": [CALL | {"function": json.dumps(CALL["function"])}]},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "gpt", "value": None, "tool_calls": [CALL]},
    ],
)
def test_tool_calls(message: dict[str, Any]) -> None:
    assert read([message]) == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


def test_system_column_of_sharegpt() -> None:
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    assert read(shared, system="be kind") == [{"role": "system", "content": "be kind"}, USER, ANSWER]
    own = [{"from": "system", "value": "be brief"}, *shared]
    assert read(own, system="be kind")[0]["content"] == "be brief"
    assert read(shared, system=" ") == read([USER, ANSWER], system="be kind") == [USER, ANSWER]


@pytest.mark.parametrize(
    ("message", "named", "role"),
    [
        ({"from": "observation", "value": ""}, (), "tool"),
        ({"from": "observation", "value": ""}, ("observation",), "observation"),
        ({"from": "observation", "value": ""}, ("observation", "tool"), "tool"),
        ({"from": "ipython", "value": ""}, ("ipython",), "ipython"),
        ({"role": "ipython", "content": ""}, (), "ipython"),
        ({"role": "observation", "content": ""}, (), "observation"),
        ({"role": "human", "content": ""}, (), "user"),
        ({"role": "human", "content": ""}, ("human",), "human"),
        ({"role": "model", "content": ""}, ("model", "assistant"), "assistant"),
        ({"role": "model", "content": ""}, ("model",), "model"),
        ({"role": "bot", "content": ""}, ("human", "bot"), "bot"),
    ],
)
def test_roles_that_the_template_names_stay(message: dict[str, Any], named: tuple[str, ...], role: str) -> None:
    assert read([message], named=named)[0]["role"] == role


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("hi", "here holds str 'hi' instead of a list of messages"),
        ([], "instead of a list of messages"),
        ({"role": ["user"], "content": ["a", "b"]}, "instead of a list of messages"),
        ([3], "holds the message int 3 instead of a mapping"),
        (
            [{"from": "narrator", "value": "x"}],
            "from 'narrator', a role that neither .* of: user, human, .*observation",
        ),
        ([{"role": "user"}], "without text under 'content'"),
        ([{"role": "user", "content": {"a": 1}}], "without text under 'content'"),
        ([{"content": "x"}], "without text under 'role'"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "part that is not text: dict .*image"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "tool calls that are no mappings"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"day": date(2026, 1, 2)}}]}],
            "of JSON values",
        ),
        ([{"from": "function_call", "value": "x"}], "whose content is not their JSON text"),
    ],
)
def test_what_is_no_conversation_is_refused(value: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(value)


@pytest.mark.parametrize("nothing", [None, "", "null", "[]", [], " "])
def test_no_tools(nothing: Any) -> None:
    assert read_tools(nothing, "here") is None


def test_tools() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": None}}
    shown = [{"type": "function", "function": {"name": "add"}}]
    for value in ([tool], tool, json.dumps([tool]), json.dumps(tool), [json.dumps(tool)]):
        assert read_tools(value, "here") == shown
    schema = {"name": "add", "parameters": json.dumps({"type": "object"})}
    for value in ([schema], {"function": json.dumps(schema)}):
        (found,) = read_tools(value, "here") or []
        assert found.get("function", found) == {"name": "add", "parameters": {"type": "object"}}
    for value in ("a hammer", ["browser"], 3, [{"since": date(2026, 1, 2)}]):
        with pytest.raises(DataError, match=r"here holds .* instead of a list of tools"):
            read_tools(value, "here")
