"""Where in a rendered conversation the assistant speaks, what ends its turns, and what text serves to train them.

Most templates do not mark the assistant's part (no `{% generation %}`, which is not used here either), so it is found by
rendering prefixes of the conversation: what the template adds for an assistant message, after the generation prompt, is
the assistant's. A text serves a turn if it begins with what the model reads before it speaks that turn, and with what it
says then. Where the whole conversation does not serve all turns (because the template leaves out the reasoning of earlier
ones, for example), the others get texts of their own, which end with them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from taid_ray.data.chat import MARK, ChatTemplate, TemplateFailed, Tools, common_prefix
from taid_ray.data.messages import Message
from taid_ray.errors import DataError

Span = tuple[int, int]
"""Half-open range of characters."""
PROBES = "0", "1"
"""Two texts of which no two renderings have more in common than what stands before them."""
THINK_END = "</think>"
THOUGHTS = re.compile(r"(\s|[<\[][^<>\[\]]*think[^<>\[\]]*[>\]])*", re.IGNORECASE)
"""What an answer may begin with that the generation prompt lacks: tags around no reasoning, but not another heading."""


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant in a text."""

    index: int
    """Of its message in the conversation."""
    span: Span
    """What it says, up to and with what ends its turn."""
    ending: str | None
    """Text of the special token that ends it; None if none does."""
    added: str = ""
    """What has to follow the text, because the template writes the token that ends a turn only where the next one begins."""
    unprompted: str = ""
    """End of the generation prompt that the rendering of the turn lacks."""


@dataclass(frozen=True)
class Rendered:
    """A text, and the turns that it trains."""

    text: str
    turns: list[Turn] = field(default_factory=list)
    messages: int = 0
    """Number of messages, from the first one, that it shows."""


class Conversation:
    """One conversation, rendered up to any of its messages."""

    def __init__(self, messages: Sequence[Message], tools: Tools, template: ChatTemplate, where: str) -> None:
        """Takes a conversation that is not empty. Errors begin with `where`."""
        self.messages, self.tools, self.template, self.where = messages, tools, template, where
        self._eos = template.tokenizer.eos_token or ""
        self._known: dict[tuple[int, bool], str] = {}

    def text(self, count: int) -> str:
        """Renders the first messages. Raises DataError if the template fails."""
        try:
            return self.rendered(count)
        except TemplateFailed as error:
            raise self._failed(count, error) from None

    def rendered(self, count: int, generation_prompt: bool = False) -> str:
        """Renders the first messages. Raises TemplateFailed."""
        key = count, generation_prompt
        if key not in self._known:
            self._known[key] = self.template.render(self.messages[:count], self.tools, generation_prompt)
        return self._known[key]

    def whole(self) -> Rendered:
        """Returns the whole conversation with the turns that it serves. Raises DataError if the template fails."""
        return self._served(len(self.messages), self._assistants())

    def trained(self, last_only: bool) -> list[Rendered]:
        """Returns the texts that train the assistant's turns, each turn in one of them, in the order of the conversation.

        last_only: the last turn only. Raises DataError if the template fails, or if a turn cannot be located.
        """
        waiting = self._assistants()[-1 if last_only else 0 :]
        found, count = [], len(self.messages)
        while count:
            served = self._served(count, waiting)
            if served.turns or not waiting:
                found.append(served)
            waiting = [index for index in waiting if index not in {turn.index for turn in served.turns}]
            if waiting and waiting[-1] + 1 == count:
                raise DataError(
                    f"{self.where}: the chat template renders the conversation up to message {count} differently once more "
                    f"follows, so the response cannot be located. Set data.chat_template to one that renders turn by turn."
                )
            count = waiting[-1] + 1 if waiting else 0
        return found[::-1]

    def _assistants(self) -> list[int]:
        return [index for index in range(len(self.messages)) if self._is_assistant(index)]

    def _is_assistant(self, index: int) -> bool:
        return bool(self.messages[index]["role"] == "assistant")

    def _served(self, count: int, indices: Sequence[int]) -> Rendered:
        text = self.text(count)
        turns = [turn for index in indices if (turn := self._turn(index, count)) is not None]
        return Rendered(text + (turns[-1].added if turns else ""), turns, count)

    def _turn(self, index: int, count: int) -> Turn | None:
        """Locates a turn in the rendering of the first `count` messages; None if that does not serve it."""
        text = self.text(count)
        try:
            after = self.rendered(index + 1)
        except TemplateFailed as error:  # for example a greeting, before any question
            return self._turn_amidst(index, count, error)
        closed = text.startswith(after)
        if not closed:  # Phi-3's template ends every rendering without a generation prompt in EOS
            after = after.removesuffix(self._eos)
        begin = self._begin(index, after) if text.startswith(after) else None
        if begin is None:
            return None
        start, unprompted = begin
        ending = self._ending(after[start:], index)
        if ending is not None:
            return Turn(index, (start, len(after)), ending, unprompted=unprompted)
        if not closed:  # that EOS is all that ends this turn, and the text lacks it
            return None
        next_token, passage = self._next_turn(index, after, text) or (None, "")
        end = len(after) + len(passage)
        return Turn(index, (start, end), next_token, passage if end > len(text) else "", unprompted)

    def _turn_amidst(self, index: int, count: int, failed: TemplateFailed) -> Turn | None:
        """Locates a turn that cannot be rendered as the last one, by what stays the same around other answers."""
        text, rest = self.text(count), self.messages[index + 1 : count]
        try:
            answers = self._answers(index, rest)
        except TemplateFailed:
            raise self._failed(index + 1, failed) from None
        start = self._prompted(common_prefix(answers))
        tail = common_prefix([answer[::-1] for answer in answers])[::-1]
        if not (rest and text.startswith(answers[0][:start]) and text.endswith(tail)):
            raise self._failed(index + 1, failed) from None
        token, passage = self.template.first_special(tail) or (None, "")
        return Turn(index, (start, len(text) - len(tail) + len(passage)), token)

    def _begin(self, index: int, after: str) -> tuple[int, str] | None:
        """Finds where a turn begins in the rendering up to it, and the end of the generation prompt that it lacks.

        None if the rendering does not begin with what the model reads before it speaks.
        """
        try:
            before = self.rendered(index, True)
        except TemplateFailed as error:  # for example with no message before the turn
            return self._begin_without_prompt(index, after, error)
        if after.startswith(before):
            return len(before), ""
        # The prompt opens more than the answer has, for example `<think>`: the turn begins where they part.
        try:
            question, answers = self.rendered(index).removesuffix(self._eos), self._answers(index)
        except TemplateFailed:
            return None
        header = common_prefix([before, *answers])
        start = len(
            common_prefix([header, after])
        )  # before its end if this answer has thoughts, as the others have not
        thoughts = header[start:], common_prefix(answers)[len(header) :]
        if start < len(question) or not header.startswith(question) or not all(map(THOUGHTS.fullmatch, thoughts)):
            return None
        return start, before[start:]

    def _begin_without_prompt(self, index: int, after: str, failed: TemplateFailed) -> tuple[int, str] | None:
        """Finds where a turn begins whose messages before cannot be rendered alone, by the prompt of other conversations."""
        try:
            header = common_prefix(self._answers(index))
        except TemplateFailed:
            raise self._failed(index, failed) from None
        start = self._prompted(header)
        return (start, "") if after.startswith(header[:start]) else None

    def _prompted(self, header: str) -> int:
        """Returns where the generation prompt ends in what stands before an answer."""
        prompt = self.template.generation_prompt
        before, found, opened = header.rpartition(prompt) if prompt else (header, "", "")
        return len(before) + len(found) if found and THOUGHTS.fullmatch(opened) else len(header)

    def _answers(self, index: int, rest: Sequence[Message] = ()) -> list[str]:
        """Renders two other answers, which have nothing in common, in place of a turn. Raises TemplateFailed."""
        before = self.messages[:index]
        return [
            self.template.render([*before, {"role": "assistant", "content": probe}, *rest], self.tools)
            for probe in PROBES
        ]

    def _ending(self, answer: str, index: int) -> str | None:
        """Returns the first special token after a turn's content; after tool calls, or no content, the last one."""
        message = self.messages[index]
        content = message["content"].rpartition(THINK_END)[2].strip()
        last_only, rest, found = bool(message.get("tool_calls")) or not content, answer.rstrip(), None
        while token := _last_token(rest, self.template.special):
            if content.endswith(token) and rest.endswith(
                content
            ):  # the content's own, which ends it if nothing else does
                found = found or token
                break
            rest, found = rest[: -len(token)].rstrip(), token
            if last_only:
                break
        token = found or _last_token(rest, self.template.added)
        return token if found or (token and not content.endswith(token)) else None

    def _next_turn(self, index: int, after: str, text: str) -> tuple[str, str] | None:
        """Returns the special token that the next turn begins with, and the same with the white space before it.

        A model that ends its turns with no token of their own stops at this one, as GLM's do.
        """
        if len(after) < len(text):
            return None if self._is_assistant(index + 1) else self.template.first_special(text[len(after) :])
        role = "tool" if self.messages[index].get("tool_calls") else "user"
        question, answer = {"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": MARK}
        # The answer may be rendered differently once more follows; another one shows what begins the next turn, too.
        for messages, end in ((self.messages[: index + 1], after), ([question, answer], MARK)):
            try:
                followed = self.template.render([*messages, {"role": role, "content": PROBES[0]}], self.tools)
            except TemplateFailed:
                continue
            if found := self.template.first_special(followed.rpartition(end)[2] if end and end in followed else ""):
                return found
        return None

    def _failed(self, count: int, error: TemplateFailed) -> DataError:
        return DataError(
            f"{self.where}: the chat template fails on the first {count} of {len(self.messages)} messages: {error}. "
            f"Fix the row, or set data.chat_template."
        )


def _last_token(text: str, tokens: tuple[str, ...]) -> str | None:
    """Returns the longest of the tokens that the text ends with."""
    return max((token for token in tokens if text.endswith(token)), key=len) if text.endswith(tokens) else None


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
