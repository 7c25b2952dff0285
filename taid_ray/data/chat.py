"""Chat templates: which one the data are rendered with, and rendering by it, the same in every process and on every day."""

import re
from collections.abc import Sequence
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from taid_ray.data.images import IMAGE_MARK
from taid_ray.data.messages import Message
from taid_ray.errors import DataError, shortened

Tools = list[dict[str, Any]] | None
MARK = "qzx"
"""A text that no template writes."""


class TemplateFailed(Exception):
    """What a template raised while it rendered."""


def chat_template(configured: str | None, tokenizer: PreTrainedTokenizerBase, tools: Tools = None) -> str | None:
    """Returns the chat template's Jinja source: `data.chat_template` (source or file), else the tokenizer's own, else None.

    A tokenizer may have a template of its own for conversations with `tools`.
    """
    if configured is None:
        try:
            return tokenizer.get_chat_template(None, tools) if tokenizer.chat_template else None
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


class ChatTemplate:
    """A chat template with its tokenizer, on a fixed day."""

    def __init__(
        self, source: str, tokenizer: PreTrainedTokenizerBase, day: date, image_token: str | None = None
    ) -> None:
        """Compiles the template.

        image_token: what it writes for an image, where there may be some; then contents are handed to it in parts. Raises
        DataError if it is not valid Jinja, draws random numbers, or should show images and does not know parts.
        """
        try:
            tree = chat_template_utils._compile_jinja_template(source).environment.parse(source)
        except TemplateSyntaxError as error:
            raise DataError(
                f"data.chat_template: not valid Jinja (line {error.lineno}: {shortened(str(error))}). Correct the template."
            ) from None
        except Exception as error:  # for example nested too deeply for the compiler
            raise DataError(
                f"data.chat_template: cannot be compiled ({shortened(error)}). Correct the template."
            ) from None
        names = {node.name for node in tree.find_all(nodes.Name)}
        if "lipsum" in names or any(node.name == "random" for node in tree.find_all(nodes.Filter)):
            raise DataError(
                "data.chat_template: draws random numbers (`random` or `lipsum`), so that no two processes would render a row "
                "alike. Remove that from the template."
            )
        self.uses_date = "strftime_now" in names
        """Whether the template asks for today's date."""
        self.literals = frozenset(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
        """The texts in quotes in the template, the roles that it knows among them."""
        self.tokenizer = tokenizer
        self.source, self._now = source, datetime(day.year, day.month, day.day)
        self._rendered_source = _with_comment(source, str(day)) if self.uses_date else source
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        self.special = tuple({*tokenizer.all_special_tokens, *(token for token, special in added.items() if special)})
        """Texts of the special tokens, one of which ends a turn in most templates."""
        self.added = tuple(token for token in added if not token.isspace())
        """Texts of all tokens that were added to the tokenizer's own."""
        beginnings = {*self.special} - ({tokenizer.bos_token} - {tokenizer.eos_token})
        self._beginning = re.compile(rf"\s*({'|'.join(map(re.escape, sorted(beginnings, key=len, reverse=True)))})")
        self.image_token = image_token
        """Text that the template writes for an image; None without images."""
        self._plain_roles: frozenset[str] | None = None
        """Roles whose content stays text; None: all roles, because there are no images."""
        if image_token is not None:
            self._plain_roles = self._roles_without_parts()

    def render(self, messages: Sequence[Message], tools: Tools = None, generation_prompt: bool = False) -> str:
        """Renders as transformers does, but for the date. Raises TemplateFailed."""
        if self.uses_date:
            # transformers keeps compiled templates by their source, which no one else has with this comment.
            compiled = chat_template_utils._compile_jinja_template(self._rendered_source)
            compiled.globals["strftime_now"] = self._now.strftime
        try:
            text = self.tokenizer.apply_chat_template(
                [self._in_parts(message) for message in messages],
                tools=None if tools is None else list(tools),
                chat_template=self._rendered_source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:  # a template computes, so it may divide by zero, call itself for ever, ...
            raise TemplateFailed(f"{shortened(error)}") from None
        return str(text)

    def _in_parts(self, message: Message) -> Message:
        """The message with its content as the parts, text and images, that templates of vision-language models take."""
        content = message["content"]
        if (
            self._plain_roles is None
            or message["role"] in self._plain_roles
            or (message.get("tool_calls") and not content)
        ):
            return message
        parts: list[dict[str, str]] = []
        for number, text in enumerate(content.split(IMAGE_MARK)):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        return message | {"content": parts or [{"type": "text", "text": ""}]}

    def _roles_without_parts(self) -> frozenset[str]:
        """Finds the roles whose content the template does not take in parts. Raises DataError if the user is one of them."""
        user = {"role": "user", "content": f"{IMAGE_MARK}{MARK}"}
        self._plain_roles = frozenset(("assistant", "system", "tool"))
        if not self._takes_parts([user]):
            raise DataError(
                f"data.chat_template: does not write {self.image_token!r} for an image in a message of the user. Set it to the "
                f"template of the vision-language model itself."
            )
        answer = {"role": "assistant", "content": MARK}
        talks = {
            "assistant": [user, answer],
            "system": [{"role": "system", "content": MARK}, user],
            "tool": [user, answer, {"role": "tool", "content": MARK}],
        }
        for role, talk in talks.items():
            before = self._plain_roles
            self._plain_roles = before - {role}
            if not self._takes_parts(talk):
                self._plain_roles = before
        return self._plain_roles

    def _takes_parts(self, talk: list[Message]) -> bool:
        """Tells whether a conversation with one image is rendered with it, and without lists as Python shows them."""
        assert self.image_token is not None
        try:
            text = self.render(talk)
        except TemplateFailed:
            return False
        return text.count(self.image_token) == 1 and "'type'" not in text and text.count(MARK) == len(talk)

    @cached_property
    def generation_prompt(self) -> str:
        """Text that the template adds to ask for an answer, or the end of it; empty if that cannot be seen."""
        question = [{"role": "user", "content": "0"}]
        try:
            without, prompted = self.render(question), self.render(question, generation_prompt=True)
        except TemplateFailed:
            return ""
        return prompted[len(common_prefix([without, prompted])) :]

    def first_special(self, text: str) -> tuple[str, str] | None:
        """Returns the special token that `text` begins with, and the same with the white space before it."""
        found = self._beginning.match(text)
        return (found[1], found[0]) if found and found[1] else None


def _with_comment(source: str, comment: str) -> str:
    """Adds a comment to the end of a template, which renders the same."""
    # Jinja drops a line break at the very end, and with `+` no white space before the comment.
    return re.sub(r"(\r\n|\r|\n)\Z", "", source) + f"{{#+ {comment} #}}"


def common_prefix(texts: Sequence[str]) -> str:
    """Returns the beginning that all texts have in common."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
