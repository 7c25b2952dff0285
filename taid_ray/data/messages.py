"""Conversations and tools as chat templates take them, from whatever usual shape stands in the data. Knows no template."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from taid_ray.data.images import IMAGE_MARK, OWN_KEYS, RowImages
from taid_ray.errors import DataError

Message = dict[str, Any]
"""One message: `role`, `content` (text) and perhaps more, such as `tool_calls`; nothing in it is None."""

ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"),
    "system": ("system",),
    "tool": ("tool", "observation", "function", "function_response", "tool_response"),
}
"""Roles that templates know, each with the names that data give it."""
TOOL_CALL_ROLES = ("function_call", "tool_call")
"""Roles of messages whose content is the JSON text of the assistant's tool calls."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text."""
IMAGE_PARTS = ("image", "image_url", "input_image")
"""Types of content parts that are images."""


@dataclass
class Understood:
    """How the messages of some data were understood."""

    roles: dict[str, str] = field(default_factory=dict)
    """Names of roles that stand in the data, and the roles they were read as, where these differ."""
    shapes: dict[str, None] = field(default_factory=dict)
    """Shapes that differ from a list of messages with role and content, in words, in the order they were met."""


def read_messages(
    value: Any,
    where: str,
    understood: Understood,
    system: Any = None,
    named: Collection[str] = (),
    images: RowImages | None = None,
) -> list[Message]:
    """Reads one conversation: a list of messages, a mapping of lists, or the JSON text of either.

    A message has its role under `role` or `from`, and its content under `content` or `value`: text, or a list of text parts;
    none beside tool calls. system: text that begins a conversation of from/value messages which has no system message.
    named: the roles that the template itself names. images: those of the row, if it may have some; contents then have
    `images.IMAGE_MARK` in the place of each. Raises DataError, beginning with `where`.
    """
    reader = _Reader(where, understood, named, images)
    messages = [reader.message(item) for item in reader.items(value)]
    if images is not None:
        reader.place_rest(messages, images)
    if reader.from_and_value and isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        understood.shapes["the column 'system' as the first message"] = None
        messages.insert(0, {"role": "system", "content": system})
    return messages


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Reads a row's tools: a list of JSON schemas, or JSON text of it or of parts of it; None for an empty one.

    Raises DataError, beginning with `where`.
    """
    if value is None or (isinstance(value, str) and value.strip() in ("", "null")):
        return None
    found = _parsed(value) if isinstance(value, str) else value
    if isinstance(found, list | dict) and not found:
        return None
    tools = [_decoded(item, ("function", "parameters")) for item in _listed(found)]
    if not all(isinstance(tool, dict) for tool in tools) or not _is_json(tools):
        raise DataError(
            f"{where} holds {shown(value)} instead of a list of tools. "
            f"Give each tool as a JSON schema (a mapping), or rename the column if it means something else."
        )
    return [without_none(tool) for tool in tools]


def without_none(value: Any) -> Any:
    """Removes the keys whose value is None at every depth: columnar files fill in what only other rows have."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    """Shows type and beginning of a value, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


@dataclass
class _Reader:
    """Reads the messages of one conversation."""

    where: str
    understood: Understood
    named: Collection[str]
    images: RowImages | None = None
    from_and_value: bool = False
    """Whether a role stood under `from`."""

    def items(self, value: Any) -> list[Any]:
        """Lists the raw messages."""
        items = value
        if isinstance(items, str) and isinstance(parsed := _parsed(items), list | dict):
            self.understood.shapes["JSON text"] = None
            items = parsed
        if isinstance(items, dict):
            lists = {key: item for key, item in items.items() if item is not None}
            lengths = {len(item) if isinstance(item, list) else -1 for item in lists.values()}
            if len(lengths) == 1 and min(lengths) > 0:
                self.understood.shapes["a mapping of lists"] = None
                items = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        if not isinstance(items, list) or not items:
            raise DataError(
                f"{self.where} holds {shown(value)} instead of a list of messages. Every message needs a 'role' and a "
                f"'content' (or 'from' and 'value'); fix the row or set data.messages_column."
            )
        return items

    def message(self, item: Any) -> Message:
        """Reads one message; its keys stay in their order."""
        found = _parsed(item) if isinstance(item, str) else item
        if not isinstance(found, dict):
            raise DataError(f"{self.where} holds the message {shown(item)} instead of a mapping. Fix the row.")
        found = without_none(found)
        calls_key = next((key for key in ("tool_calls", "function_call") if found.get(key)), "tool_calls")
        calls = self._tool_calls(found, calls_key)
        role_key = "role" if "role" in found or "from" not in found else "from"
        text_key = "content" if "content" in found or "value" not in found else "value"
        name = found.get(role_key)
        asks = not isinstance(name, str) or name.strip().lower() not in ROLES["assistant"]
        content = self._content(found.get(text_key, "" if calls else None), item, asks)
        if not isinstance(name, str):
            raise DataError(
                f"{self.where} holds a message without text under 'role' (or 'from'): {shown(item)}. Fix the row."
            )
        if name in TOOL_CALL_ROLES and name not in self.named and not calls:
            role, calls, content = "assistant", self._calls_in(content, item), ""
        else:
            role = self._role(name, role_key)
        self._note(name, role, role_key, text_key)
        new = {role_key: ("role", role), text_key: ("content", content), calls_key: ("tool_calls", calls)}
        kept = {key: value for key, value in found.items() if key != "tool_calls" or (calls and key == calls_key)}
        order = kept | {text_key: content} | ({calls_key: calls} if calls else {})
        return dict(new.get(key, (key, value)) for key, value in order.items())

    def _note(self, name: str, role: str, role_key: str, text_key: str) -> None:
        self.from_and_value = self.from_and_value or role_key == "from"
        if role != name:
            self.understood.roles[name] = role
        if role_key == "from" or text_key == "value":
            self.understood.shapes["messages with from and value"] = None

    def _role(self, name: str, key: str) -> str:
        """Returns the role that templates know for the name that stands under `key`.

        What stands under `role` is left to the template, but for other names of assistant, user and system.
        """
        plain = name.strip().lower()
        role = next((role for role, names in ROLES.items() if plain in names), None)
        if role == "assistant":
            return name if key == "role" and name in self.named and role not in self.named else role
        if key == "role":
            return name if role is None or name in self.named or (role == "tool" and plain != role) else role
        if name in self.named and (role is None or (role == "tool" and role not in self.named)):
            return name
        if role is None:
            accepted = ", ".join(name for names in ROLES.values() for name in names)
            raise DataError(
                f"{self.where} holds a message from {name[:80]!r}, a role that neither taid-ray nor the chat template knows. "
                f"Rename it to one of: {accepted}."
            )
        return role

    def place_rest(self, messages: list[Message], images: RowImages) -> None:
        """Puts images for which there is no mark before the first text of the user. Raises DataError if marks are lacking."""
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None and (marks := images.rest()):
            self.understood.shapes["images without a mark, put before the first message of the user"] = None
            first["content"] = marks + first["content"]
        images.check_all_used()

    def _content(self, value: Any, item: Any, asks: bool) -> str:
        """Returns a message's content as text. asks: it is not the assistant's, whose `<image>` is text."""
        if isinstance(value, str):
            return self._text(value, asks)
        if not isinstance(value, list) or not value:
            raise DataError(
                f"{self.where} holds a message without text under 'content' (or 'value'): {shown(item)}. Fix the row."
            )
        texts = []
        for part in value:
            kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else ("text", part)
            if self.images is not None and kind in IMAGE_PARTS:
                texts.append(self.images.mark(_own_image(part)))
                continue
            if kind not in TEXT_PARTS or not isinstance(text, str):
                raise DataError(
                    f"{self.where} holds a content part that is not text: {shown(part)}. Only text can be trained on; leave "
                    f"other parts out."
                )
            texts.append(self._text(text, asks))
        self.understood.shapes["content in parts, whose texts were joined"] = None
        return "".join(texts)

    def _text(self, text: str, asks: bool) -> str:
        if self.images is None:
            return text
        if IMAGE_MARK in text:
            raise DataError(f"{self.where} holds the character {IMAGE_MARK!r}, which no text has. Fix the row.")
        return self.images.marked(text) if asks else text

    def _tool_calls(self, message: Message, key: str) -> list[Any]:
        """Reads a message's tool calls; older data have one, under `function_call`."""
        value = message.get(key) or []
        found = _parsed(value) or value if isinstance(value, str) else value
        calls = [_decoded(call, ("function",)) for call in _listed(found)]
        if key == "function_call":
            calls = [_wrapped(call) for call in calls]
        bodies = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
        if not all(isinstance(body, dict) for body in bodies) or not _is_json(calls):
            raise DataError(
                f"{self.where} holds tool calls that are no mappings of JSON values: {shown(value)}. Fix the row."
            )
        return calls

    def _calls_in(self, content: str, item: Any) -> list[Any]:
        """Reads the tool calls of a message whose content they are, as JSON text."""
        calls = _listed(_parsed(content))
        if not all(isinstance(call, dict) for call in calls):
            raise DataError(
                f"{self.where} holds a message of tool calls whose content is not their JSON text: {shown(item)}. Fix the row."
            )
        return [_wrapped(call) for call in calls]


def _own_image(part: Message) -> Any:
    """Returns what a content part says of its image: a value as in a column of images, or None if it only marks a place."""
    own = {key: part[key] for key in OWN_KEYS if part.get(key) not in (None, "")}
    for key in ("image", "image_url"):
        if key in own:
            return own[key]
    return own or None


def _wrapped(call: Any) -> Any:
    """Puts a call into the mapping that templates expect around it."""
    return call if not isinstance(call, dict) or "function" in call else {"type": "function", "function": call}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _decoded(value: Any, keys: Collection[str]) -> Any:
    """Decodes a mapping where it is JSON text, and so what stands in it under `keys`."""
    parsed = _parsed(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        return value
    return {key: _decoded(item, keys) if key in keys else item for key, item in parsed.items()}


def _is_json(value: Any) -> bool:
    """Tells whether JSON can hold a value. In place of any other, transformers would show the name of its type."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _parsed(text: str) -> Any:
    """Parses JSON text; returns None for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
