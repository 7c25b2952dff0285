"""Whether a chat template shows what the messages of a conversation hold, and tool calls in the form that it shows rightly.

A template may trim, escape or reorder what it shows, so texts are not looked for. Instead a mark that stands nowhere else
is added to every piece, and has to appear. What stands before `</think>` a template may leave out.
"""

import json
from collections.abc import Callable
from itertools import count
from typing import Any

from taid_ray.data.chat import MARK, TemplateFailed
from taid_ray.data.images import IMAGE_MARK
from taid_ray.data.messages import Message
from taid_ray.data.turns import THINK_END, Conversation
from taid_ray.errors import DataError


def check_shown(conversation: Conversation) -> None:
    """Raises DataError for a message whose content or tool calls the template leaves out, and for tools that it leaves out.

    A message may be left out once others follow, but not where it is the last one.
    """
    marker = _Marker(conversation)
    marked = Conversation(marker.messages, marker.tools, conversation.template, conversation.where)
    try:
        whole = marked.rendered(len(marked.messages))
    except TemplateFailed:  # it takes some piece for what it is, for example the name of a tool
        return _check_texts(conversation)
    for mark, (index, what) in marker.marks.items():  # a template may write capitals
        if mark not in whole.lower() and (index < 0 or mark not in _last(marked, index).lower()):
            raise _left_out(conversation, index, what)


def with_fitting_arguments(conversation: Conversation) -> Conversation:
    """Returns the conversation with the arguments of its tool calls as the template wants them, mappings or JSON text.

    As they are, if the template shows them rightly; it does not if it quotes JSON text once more, or shows a mapping as
    Python does.
    """
    if not any(_bodies(message) for message in conversation.messages):
        return conversation
    for change in (_same, _as_mapping, _as_text):
        messages = [_with_arguments(message, change) for message in conversation.messages]
        candidate = Conversation(messages, conversation.tools, conversation.template, conversation.where)
        try:
            text = candidate.rendered(len(messages))
        except TemplateFailed:
            continue
        if all(_fits(body.get("arguments"), text) for message in messages for body in _bodies(message)):
            return candidate
    return conversation


class _Marker:
    """A copy of a conversation with marks in it."""

    def __init__(self, conversation: Conversation) -> None:
        self.marks: dict[str, tuple[int, str]] = {}
        """Each mark with the index of its message (-1: the tools) and what bears it."""
        text = conversation.rendered(len(conversation.messages)).lower()
        self._stem = next(stem for i in count() if (stem := MARK + "x" * i) not in text)
        self.tools = conversation.tools and [self._tool(tool) for tool in conversation.tools]
        self.messages = [self._message(index, message) for index, message in enumerate(conversation.messages)]

    def _mark(self, index: int, what: str) -> str:
        mark = f"{self._stem}{len(self.marks)}z"
        self.marks[mark] = index, what
        return mark

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        body = tool.get("function", tool)
        if not isinstance(body, dict) or not isinstance(body.get("name"), str):
            return tool
        new = body | {"name": body["name"] + self._mark(-1, f"the tool {body['name']!r}")}
        return tool | {"function": new} if "function" in tool else new

    def _message(self, index: int, message: Message) -> Message:
        marked = dict(message)
        if message["content"].strip():
            marked["content"] += self._mark(index, "content")
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [self._call(index, call) for call in calls]
        return marked

    def _call(self, index: int, call: dict[str, Any]) -> dict[str, Any]:
        body = dict(call.get("function", call))
        if isinstance(name := body.get("name"), str):
            body["name"] = name + self._mark(index, f"tool call {name!r}")
        if (arguments := body.get("arguments")) is not None:
            body["arguments"] = self._leaves(arguments, index)
        return call | {"function": body} if "function" in call else body

    def _leaves(self, value: Any, index: int) -> Any:
        """Replaces every value in the arguments of a call by a mark; text keeps its beginning."""
        if isinstance(value, dict):
            return {key: self._leaves(item, index) for key, item in value.items()}
        if isinstance(value, list):
            return [self._leaves(item, index) for item in value]
        return (value if isinstance(value, str) else "") + self._mark(index, "the arguments of a tool call")


def _check_texts(conversation: Conversation) -> None:
    """Looks for the contents themselves."""
    whole = conversation.rendered(len(conversation.messages))
    for index, message in enumerate(conversation.messages):
        for part in message["content"].rpartition(THINK_END)[2].split(IMAGE_MARK):  # images are counted elsewhere
            text = part.strip()
            forms = text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]
            if not any(form in whole or form in _last(conversation, index) for form in forms):
                raise _left_out(conversation, index, "content")


def _last(conversation: Conversation, index: int) -> str:
    """Renders a message as the last one; empty if the template fails."""
    try:
        return conversation.rendered(index + 1)
    except TemplateFailed:
        return ""


def _left_out(conversation: Conversation, index: int, what: str) -> DataError:
    if index < 0:
        return DataError(
            f"{conversation.where}: the chat template leaves out {what} of the row. "
            f"Set data.chat_template to one that shows tools, or remove the column 'tools'."
        )
    role = conversation.messages[index]["role"]
    return DataError(
        f"{conversation.where}: the chat template leaves out message {index + 1}, of role {role!r} ({what}). "
        f"Set data.chat_template to one that shows it, or remove the message."
    )


def _bodies(message: Message) -> list[dict[str, Any]]:
    """Lists the tool calls of a message, each as the mapping that holds its name and arguments."""
    return [call.get("function", call) for call in message.get("tool_calls", [])]


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        body = call.get("function", call)
        new = body | {"arguments": change(body["arguments"])} if "arguments" in body else body
        calls.append(call | {"function": new} if "function" in call else new)
    return message | {"tool_calls": calls}


def _same(arguments: Any) -> Any:
    return arguments


def _as_mapping(arguments: Any) -> Any:
    """Decodes the JSON text of a mapping, once."""
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _fits(arguments: Any, text: str) -> bool:
    """Tells whether a rendered text shows arguments rightly."""
    if isinstance(arguments, str):
        quoted = any(json.dumps(arguments, ensure_ascii=ascii_only) in text for ascii_only in (True, False))
        return arguments.strip() in text and not quoted
    return arguments in (None, {}, []) or repr(arguments) == json.dumps(arguments) or repr(arguments) not in text
