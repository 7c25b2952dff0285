"""Conversations as text: rendering by a chat template, and where in that text the assistant speaks.

Most templates do not mark the assistant's part (no `{% generation %}`), so it is found by rendering prefixes of the
conversation: what the template adds for an assistant message, after the generation prompt, is the assistant's.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from taid_ray.errors import DataError

Span = tuple[int, int]
"""Half-open range of characters."""
Message = dict[str, Any]


def chat_template(configured: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the chat template's Jinja source: `data.chat_template` (source or file), else the tokenizer's own, else None."""
    if configured is None:
        try:
            return tokenizer.get_chat_template() if tokenizer.chat_template else None
        except ValueError:  # several, none of which is the default
            raise DataError(
                f"data.chat_template: missing, and the tokenizer {tokenizer.name_or_path!r} has several templates of its "
                f"own, none of which is the default. Set data.chat_template to one of them."
            ) from None
    if "{" in configured:  # every template has one, and hardly any path
        return configured
    try:
        return Path(configured).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no text, or a name that no file can have
        raise DataError(
            f"data.chat_template: {configured!r} is neither Jinja source nor a readable file ({error}). "
            f"Give the template itself or the path of a file that holds it."
        ) from None


def read_messages(value: Any, where: str) -> list[Message]:
    """Checks one conversation: a list of mappings with text under `role` and `content`. Raises DataError."""
    fix = "Every message needs a 'role' and a 'content', both text; fix the row or set data.messages_column."
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} holds {shown(value)} instead of a list of messages. {fix}")
    for message in value:
        if not isinstance(message, dict):
            raise DataError(f"{where} holds the message {shown(message)} instead of a mapping. {fix}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{where} holds a message without text under {key!r}: {shown(message)}. {fix}")
    # `datasets` fills keys that only some messages have with None; templates take a present key for a used one.
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def render(
    messages: Sequence[Message], template: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[Span]]:
    """Renders the whole conversation as text, and locates the assistant's spans in it (what closes its turn included).

    Raises DataError, beginning with `where`, if the template fails or if the rendering of the messages up to some point
    is not how the whole rendering begins: then the assistant's part cannot be located.
    """

    def rendered(count: int, generation_prompt: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                list(messages[:count]), chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateSyntaxError as error:
            raise DataError(
                f"data.chat_template: not valid Jinja (line {error.lineno}: {_reason(error)}). Correct the template."
            ) from None
        except Exception as error:  # a template computes, so it may divide by zero, call itself for ever, ...
            raise DataError(
                f"{where}: the chat template fails on the first {count} of {len(messages)} messages: "
                f"{type(error).__name__}: {_reason(error)}. Fix the row, or set data.chat_template."
            ) from None
        return str(text)

    full = rendered(len(messages), False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = rendered(index, True)
        after = full if index + 1 == len(messages) else rendered(index + 1, False)
        if not full.startswith(after):  # Phi-3's template ends every rendering without a generation prompt in EOS
            after = after.removesuffix(str(tokenizer.eos_token))
        if not (full.startswith(after) and after.startswith(before)):
            raise DataError(
                f"{where}: the chat template renders the conversation up to message {index + 1} differently once more "
                f"follows, so the response cannot be located. Set data.chat_template to one that renders turn by turn."
            )
        spans.append((len(before), len(after)))
    return full, spans


def inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Tells for each token, given as its range of characters, whether some of its text is in one of the ascending spans.

    Tokens without width count where they stand.
    """
    marks = []
    remaining = list(reversed(spans))
    for begin, end in offsets:
        while remaining and remaining[-1][1] <= begin:
            remaining.pop()
        start = remaining[-1][0] if remaining else math.inf
        marks.append(end > start or begin >= start)
    return marks


def _reason(error: Exception) -> str:
    """Returns an error's message in one line."""
    return " ".join(str(error).split())[:300]


def shown(value: Any) -> str:
    """Shows type and beginning of a value, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
