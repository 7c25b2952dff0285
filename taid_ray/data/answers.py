"""From the messages of a row to the texts that train the assistant's answers, and what can be said about the answers."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from taid_ray.config.data import DataConfig
from taid_ray.data.chat import ChatTemplate, Tools, chat_template
from taid_ray.data.images import IMAGE_MARK, RowImages
from taid_ray.data.messages import Message, Understood, read_messages, read_tools
from taid_ray.data.turns import THINK_END, Conversation, Rendered
from taid_ray.data.visibility import check_shown, with_fitting_arguments
from taid_ray.errors import DataError

REASONING = "reasoning_content", "thinking", "reasoning"
"""Keys under which messages have their reasoning apart."""


@dataclass
class AnswerCounts:
    """Numbers of the answers of the assistant that were rendered so far."""

    endings: Counter[str | None] = field(default_factory=Counter)
    """By the special token that ends them; None: no token does."""
    added: Counter[str] = field(default_factory=Counter)
    """By the token that was added behind them, because the template writes it with the next turn only."""
    unprompted: Counter[str] = field(default_factory=Counter)
    """By the end of the generation prompt that they lack, for example `<think>`."""
    empty: int = 0
    """Those without text or tool call."""
    lost_reasoning: int = 0
    """Those whose reasoning the template leaves out."""
    split: int = 0
    """Conversations, not answers, that needed several texts."""
    with_tools: int = 0
    """Rows, not answers, that have tools."""
    unused_system: int = 0
    """Rows, not answers, whose column `system` is not used."""


class AnswerRenderer:
    """Renders conversations with the chat template of some data."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, image_token: str | None = None) -> None:
        """image_token: what the template writes for an image, where there may be some.

        Raises DataError if there is no chat template, or none that can be used.
        """
        self.counts, self._understood = AnswerCounts(), Understood()
        self._config, self._tokenizer, self._image_token = config, tokenizer, image_token
        self._day = date.fromisoformat(config.date) if config.date else date.today()
        self._templates: dict[bool, ChatTemplate] = {}
        """By whether there are tools."""
        self._template(None)

    def conversation(self, document: dict[str, Any], where: str, images: RowImages | None = None) -> list[Rendered]:
        """Renders a row of `format: chat`. images: those of the row, if it may have some.

        Raises DataError, beginning with `where`.
        """
        column, system = self._config.messages_column, document.get("system")
        tools = read_tools(document.get("tools"), f"{where} of column 'tools'")
        template = self._template(tools)
        place = f"{where} of column {column!r}"
        messages = read_messages(document[column], place, self._understood, system, template.literals, images)
        self.counts.with_tools += tools is not None
        used = not isinstance(system, str) or not system.strip() or messages[0].get("content") == system
        self.counts.unused_system += not used
        return self.render(messages, tools, where)

    def render(self, messages: list[Message], tools: Tools, where: str) -> list[Rendered]:
        """Renders messages as the texts that train their answers. Raises DataError, beginning with `where`."""
        self._check_words(messages, where)
        conversation = with_fitting_arguments(Conversation(messages, tools, self._template(tools), where))
        whole = self._config.loss_on == "all"
        found = [conversation.whole()] if whole else conversation.trained(self._config.turns == "last")
        check_shown(conversation)
        self._check_images(conversation, found)
        self._count(conversation, found)
        return found

    def stop_ids(self) -> list[int]:
        """Lists the ids of the tokens that end the answers rendered so far."""
        return sorted(self._ends().values())

    def description(self) -> list[str]:
        """Says in sentences how conversations are rendered, and how those so far were understood."""
        said = [f"chat template: {self._origin()}"]
        if any(template.uses_date for template in self._templates.values()):
            said.append(f"the chat template writes the date, which is {self._day} (data.date)")
        if self._understood.shapes:
            said.append(f"conversations are read from: {'; '.join(self._understood.shapes)}")
        if self.counts.with_tools:
            said.append(f"{self.counts.with_tools} row(s) have tools, in the column 'tools'")
        if roles := self._understood.roles:
            said.append(f"roles are read so: {', '.join(f'{name} as {role}' for name, role in roles.items())}")
        counts = self.counts
        if ends := self._ends():
            said.append(f"an answer ends with: {', '.join(f'{token} (id {number})' for token, number in ends.items())}")
        for passage in counts.added:
            said.append(
                f"the chat template writes {passage!r} with the next turn only; it was added after the last answer"
            )
        said.append(self._loss())
        if counts.split:
            said.append(
                f"{counts.split} conversation(s) gave several samples, because the chat template renders earlier answers "
                f"differently once more follows"
            )
        return said

    def notes(self) -> list[str]:
        """Says in sentences what of the conversations so far may not be meant."""
        counts, said = self.counts, []
        if missing := counts.endings[None]:
            said.append(
                f"no special token ends {missing} of {counts.endings.total()} answer(s), so the student does not learn where to "
                "stop; let data.chat_template write one after each answer, for example {{ eos_token }}"
            )
        if counts.lost_reasoning:
            said.append(
                f"the chat template leaves out the reasoning of {counts.lost_reasoning} answer(s), which is not trained; set "
                "data.chat_template to one that keeps it"
            )
        for prompt, number in counts.unprompted.items():
            said.append(
                f"the generation prompt ends with {prompt!r}, which {number} answer(s) lack as the chat template renders them: "
                "the student learns to answer without it; set data.chat_template to one that agrees with itself"
            )
        if counts.unused_system:
            said.append(
                f"the column 'system' of {counts.unused_system} row(s) is not used: it goes with from/value conversations that "
                "have no system message; put it into the messages if it is one"
            )
        return said

    def _check_words(self, messages: list[Message], where: str) -> None:
        """Raises DataError for a text that the processor would take for an image."""
        if self._image_token is not None and any(self._image_token in message["content"] for message in messages):
            raise DataError(
                f"{where} has {self._image_token!r} in its text, which the model takes for an image. Remove it, or give the row "
                f"an image in data.images_column for each."
            )

    def _check_images(self, conversation: Conversation, found: list[Rendered]) -> None:
        """Raises DataError if the template shows more or fewer images than the messages have."""
        if self._image_token is None:
            return
        for rendered in found:
            shown = rendered.text.count(self._image_token)
            messages = conversation.messages[: rendered.messages]
            if shown != (given := sum(message["content"].count(IMAGE_MARK) for message in messages)):
                raise DataError(
                    f"{conversation.where}: the chat template shows {shown} of {given} images; set data.chat_template to the "
                    f"model's own."
                )

    def _ends(self) -> dict[str, int]:
        """The special tokens that end answers, with their ids."""
        tokens = [token for token in self.counts.endings if token is not None]
        return {token: cast(int, self._tokenizer.convert_tokens_to_ids(token)) for token in tokens}

    def _template(self, tools: Tools) -> ChatTemplate:
        known = tools is not None
        if known not in self._templates:
            source = chat_template(self._config.chat_template, self._tokenizer, tools)
            if source is None:
                raise DataError(
                    f"data.format: chat needs a chat template and the tokenizer {self._tokenizer.name_or_path!r} has none. "
                    f"Set data.chat_template to a Jinja template or to a file that holds one."
                )
            self._templates[known] = ChatTemplate(source, self._tokenizer, self._day, self._image_token)
        return self._templates[known]

    def _origin(self) -> str:
        configured = self._config.chat_template
        if configured is not None:
            return "data.chat_template" if "{" in configured else configured
        several = len({template.source for template in self._templates.values()}) > 1
        also = ", and another one for rows with tools" if several else ""
        return f"the tokenizer's own ({self._tokenizer.name_or_path}){also}"

    def _loss(self) -> str:
        if self._config.loss_on == "all":
            return "loss on all tokens (data.loss_on: all)"
        turns = "the last answer" if self._config.turns == "last" else "every answer"
        return f"loss on {turns} of a conversation, with what ends it (data.turns: {self._config.turns})"

    def _count(self, conversation: Conversation, found: list[Rendered]) -> None:
        counts = self.counts
        counts.split += len(found) > 1
        for rendered in found:
            for turn in rendered.turns:
                message = conversation.messages[turn.index]
                counts.endings[turn.ending] += 1
                counts.added.update([turn.added] * bool(turn.added))
                counts.unprompted.update([turn.unprompted] * bool(turn.unprompted))
                counts.empty += not message["content"].strip() and not message.get("tool_calls")
                reasoning = [message.get(key) for key in REASONING]
                reasoning.append(message["content"].rpartition(THINK_END)[0].rpartition("<think>")[2])
                lost = (text for text in reasoning if isinstance(text, str) and text.strip() not in rendered.text)
                counts.lost_reasoning += any(lost)
