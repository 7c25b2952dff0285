"""What of a conversation carries loss, with templates of all families."""

from datetime import date
from typing import Any

import pytest

from taid_ray.errors import DataError
from tests.support.chat_templates import (
    ALPACA,
    CHATML,
    CHATML_TOOLS,
    GEMMA,
    GLM,
    GLM_THINKING,
    HARMONY,
    LLAMA3,
    MISTRAL,
    NOT_THINKING,
    PHI3,
    QWEN3,
    QWEN3_THINKING,
    R1,
    TEXT_ARGUMENTS,
    ZEPHYR,
)
from tests.support.chats import chat_tokenizer, encoded, encoder_of, trained


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation whose messages alternate, the user's first."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def call(name: str, arguments: Any, content: Any = None) -> dict[str, Any]:
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [function]}


# Qwen3.5 renders no conversation without a question.
NEEDS_QUESTION = (
    "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('no question') }}{% endif %}"
)
TWO = chat("hi", "yo", "how", "fine")
TOOL = {"type": "function", "function": {"name": "add", "description": "sum"}}
THOUGHT = chat("hi", "<think>\nhm\n</think>\n\nyo")


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, TWO, ["⟦yo<|im_end|>\n⟧", "⟦fine<|im_end|>\n⟧"]),
        (CHATML, TWO[1:], ["⟦yo<|im_end|>\n⟧", "⟦fine<|im_end|>\n⟧"]),
        (CHATML, [*TWO, {"role": "user", "content": "bye"}], ["⟦yo<|im_end|>\n⟧", "⟦fine<|im_end|>\n⟧"]),
        (
            CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
            TWO,
            ["⟦yo<|im_end|>\n⟧", "⟦fine<|im_end|>\n⟧"],
        ),
        (LLAMA3, chat("hi", " yo ", system="be kind"), ["⟦yo<|eot|>⟧"]),
        (
            LLAMA3,
            [TWO[0], TWO[1], {"role": "ipython", "content": '{"a": "b"}'}, TWO[3]],
            ["⟦yo<|eot|>⟧", "⟦fine<|eot|>⟧"],
        ),
        (MISTRAL, TWO, ["⟦ yo</s>⟧", "⟦ fine</s>⟧"]),
        (MISTRAL, chat("hi", "yo", system="be kind"), ["⟦ yo</s>⟧"]),
        (GEMMA, TWO, ["⟦yo<|turn|>\n⟧", "⟦fine<|turn|>\n⟧"]),
        (GEMMA, [{"role": "user", "content": "hi"}, {"role": "model", "content": "yo"}], ["⟦yo<|turn|>\n⟧"]),
        (PHI3, TWO, ["⟦yo<|end|>\n⟧", "⟦fine<|end|>\n</s>⟧"]),
        (ZEPHYR, TWO, ["⟦yo</s>\n⟧", "⟦fine</s>\n⟧"]),
        (R1, TWO, ["⟦yo</s>⟧", "⟦fine</s>⟧"]),
        (R1, TWO[1:], ["⟦yo</s>⟧", "⟦fine</s>⟧"]),
        (R1, chat("hi", "<tea>"), ["⟦<tea></s>⟧"]),  # what it has in common with <think> is the answer's
        (QWEN3, THOUGHT, ["⟦<think>\nhm\n</think>\n\nyo<|im_end|>\n⟧"]),
        (QWEN3_THINKING, THOUGHT, ["⟦hm\n</think>\n\nyo<|im_end|>\n⟧"]),
        (QWEN3_THINKING, chat("hi", "yo"), ["⟦\n</think>\n\nyo<|im_end|>\n⟧"]),
        (CHATML + NEEDS_QUESTION, TWO[1:], ["⟦yo<|im_end|>⟧", "⟦fine<|im_end|>\n⟧"]),
        (GLM + NEEDS_QUESTION, TWO[1:], ["⟦yo<|user|>⟧", "⟦fine<|user|>⟧"]),
        (NOT_THINKING, chat("hi", "yo"), ["⟦yo<|im_end|>\n⟧"]),
        (NOT_THINKING, THOUGHT, ["⟦hm\n</think>\n\nyo<|im_end|>\n⟧"]),
        (GLM_THINKING, THOUGHT, ["⟦<think>\nhm\n</think>\n\nyo<|user|>⟧"]),
        (GLM, TWO, ["⟦yo<|user|>⟧", "⟦fine<|user|>⟧"]),
        (
            GLM,
            [TWO[0], TWO[1], {"role": "observation", "content": "x"}, TWO[3]],
            ["⟦yo<|observation|>⟧", "⟦fine<|user|>⟧"],
        ),
        (ALPACA, TWO, ["⟦yo⟧", "⟦fine⟧"]),
    ],
)
def test_answers_carry_loss_with_what_ends_them(template: str, messages: Any, expected: list[str]) -> None:
    (text,) = trained(template, messages)
    assert ["⟦" + part.partition("⟧")[0] + "⟧" for part in text.split("⟦")[1:]] == expected
    tokenizer = chat_tokenizer()
    given = [{**m, "role": "assistant"} if m["role"] == "model" else m for m in messages]
    if template is not LLAMA3 and not template.startswith(GLM) and template is not GLM_THINKING:
        whole = tokenizer.apply_chat_template(given, chat_template=template, tokenize=False)
        assert text.replace("⟦", "").replace("⟧", "") == whole


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            QWEN3,
            TWO,
            [
                "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nyo<|im_end|>\n⟧",
                "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nhow<|im_end|>\n"
                "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nfine<|im_end|>\n⟧",
            ],
        ),
        (MISTRAL, chat("hi", "yo", "how", "fine", system="S"), ["<s>[INST] S\n\nhi[/INST]⟦ yo</s>⟧",
            "<s>[INST] hi[/INST] yo</s>[INST] S\n\nhow[/INST]⟦ fine</s>⟧"]),
    ],
)  # fmt: skip
def test_every_answer_as_it_is_generated(template: str, messages: Any, expected: list[str]) -> None:
    assert trained(template, messages) == expected
    assert trained(template, messages, turns="last") == expected[-1:]
    # What follows the last answer cannot be in its sample.
    more = [*messages, {"role": "user", "content": "bye"}]
    assert trained(template, more) == expected and trained(template, more, turns="last") == expected[-1:]


def test_answers_of_one_question_share_a_sample() -> None:
    messages = [*TWO, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "well"}]
    first, second = trained(QWEN3, messages)
    assert first.count("⟦") == 1 and second.count("⟦") == 2


def test_last_turn_only_where_one_text_serves_all() -> None:
    (text,) = trained(CHATML, TWO, turns="last")
    assert text.count("⟦") == 1 and text.endswith("⟦fine<|im_end|>\n⟧")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ALPACA.replace("{{ '\n\n' }}###", "\n\n###"), 4),  # Jinja drops a line break after a tag
        (CHATML.replace("<|im_end|>", "<|im_end|>{{ loop.length }}"), 4),
        (CHATML.replace("<|im_start|>assistant", "<|im_start|>other"), 4),
    ],
)
def test_templates_that_contradict_themselves_are_refused(template: str, message: int) -> None:
    with pytest.raises(DataError, match=f"row 1: .* up to message {message} differently .*cannot be located"):
        trained(template, TWO)


def test_harmony() -> None:
    head = "<|start|>system<|message|>2026-01-02<|end|><|start|>user<|message|>hi<|end|>"
    messages = [*chat("hi", "yo", "how"), {"role": "assistant", "content": "fine", "thinking": "hm"}]
    first, second = trained(HARMONY, messages, date="2026-01-02")
    assert first == head + "<|start|>assistant⟦<|channel|>final<|message|>yo<|return|>⟧"
    assert second == (
        f"{head}<|start|>assistant<|channel|>final<|message|>yo<|end|><|start|>user<|message|>how<|end|><|start|>assistant"
        "⟦<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>fine<|return|>⟧"
    )
    tokenizer = chat_tokenizer()
    encoder = encoder_of(tokenizer, chat_template=HARMONY)
    encoded(encoder, tokenizer, [TWO[0], call("f", {"a": 1}), {"role": "tool", "content": "3"}, TWO[3]])
    assert tokenizer.convert_ids_to_tokens(encoder.stop_ids()) == ["<|return|>", "<|call|>"]


@pytest.mark.parametrize(
    ("template", "settings", "tokens"),
    [
        (CHATML, {}, ["<|im_end|>"]),
        (CHATML, {"plain": ("<|im_end|>",)}, ["<|im_end|>"]),
        (PHI3, {"eos": "<|endoftext|>"}, ["<|end|>"]),
        (GLM, {"eos": "<|endoftext|>"}, ["<|user|>"]),
        (ZEPHYR, {}, ["</s>"]),
        (ALPACA, {}, []),
    ],
)
def test_tokens_at_which_generation_stops(template: str, settings: Any, tokens: list[str]) -> None:
    tokenizer = chat_tokenizer(**settings)
    encoder = encoder_of(tokenizer, chat_template=template)
    encoded(encoder, tokenizer, chat("hi", "|>"))
    assert tokenizer.convert_ids_to_tokens(encoder.stop_ids()) == tokens
    assert any("no special token ends 1 of 1 answer(s)" in note for note in encoder.notes()) == (not tokens)
    said = [line for line in encoder.description() if line.startswith("an answer ends with: ")]
    assert [token in said[0] for token in tokens] == [True] * len(tokens)


@pytest.mark.parametrize(
    "arguments", [{"a": "Oslo", "b": [1, {"c": None, "d": True}]}, '{"a": "Oslo", "b": [1, {"d": true}]}']
)
@pytest.mark.parametrize("template", [CHATML_TOOLS, TEXT_ARGUMENTS])
def test_arguments_of_tool_calls_are_shown_once(template: str, arguments: Any) -> None:
    (text,) = trained(
        template, [TWO[0], call("add", arguments), {"role": "tool", "content": "3"}, TWO[3]], tools=[TOOL]
    )
    assert text.startswith(
        '<|im_start|>system\n{"type": "function", "function": {"name": "add", "description": "sum"}}'
    )
    assert (
        '⟦<tool_call>\n{"name": "add", "arguments": {"a": "Oslo", "b": [1, {"d": true}]}}\n</tool_call><|im_end|>\n⟧'
        in text
    )


def test_json_text_that_a_template_shows_as_it_is_stays_as_it_is() -> None:
    either = CHATML_TOOLS.replace(
        "c.function.arguments | tojson",
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
    )
    (text,) = trained(either, [TWO[0], call("add", '{"a":1,"b":null}')])
    assert '"arguments": {"a":1,"b":null}}' in text


@pytest.mark.parametrize(
    ("template", "messages", "tools", "said"),
    [
        (CHATML, [TWO[0], call("add", {})], None, r"leaves out message 2, of role 'assistant' \(tool call 'add'\)"),
        (CHATML, TWO, [TOOL], "leaves out the tool 'add' of the row"),
        (
            CHATML_TOOLS.replace("c.function.arguments | tojson", "'{}'"),
            [TWO[0], call("add", {"a": 1})],
            None,
            "the arguments",
        ),
        (PHI3, chat("hi", "a", system="a"), None, r"row 1: .* leaves out message 1, of role 'system' \(content\)"),
        (PHI3, [*TWO, {"role": "ipython", "content": "x"}], None, "leaves out message 5, of role 'ipython'"),
        (CHATML.replace("{{ m.content }}", "{{ m.content[:1] }}"), TWO, None, "leaves out message 1"),
        (GEMMA, chat("hi", "yo", system="S"), None, "the chat template fails .*no system role"),
        (MISTRAL, TWO[1:], None, "roles must alternate"),
        (CHATML + NEEDS_QUESTION, TWO[1:2], None, "no question"),
    ],
)
def test_what_a_template_leaves_out_is_an_error(template: str, messages: Any, tools: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        trained(template, messages, tools=tools)


def test_a_template_may_change_what_it_shows() -> None:
    changed = CHATML.replace("{{ m.content }}", "{{ (m.content | trim).replace('a', '\\u00e4') | tojson }}")
    (text,) = trained(changed, chat('an "apple"\n', " pear\n"))
    assert "⟦" in text and '\\"äpple\\"' in text


def test_a_template_may_write_capitals() -> None:
    (text,) = trained(CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), chat("hi", "yo"))
    assert "⟦YO<|im_end|>\n⟧" in text


def test_an_answer_may_bring_the_token_that_ends_it() -> None:
    """The next turn's token is not taken for the end then."""
    plain = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (text,) = trained(plain + prompt, chat("hi", "yo</s>", "how", "fine</s>"))
    assert text.endswith("⟦fine</s>⟧") and "⟦yo</s>⟧<|im_start|>" in text


def test_reasoning_that_is_left_out_and_empty_answers_are_said() -> None:
    tokenizer = chat_tokenizer()
    encoder = encoder_of(tokenizer, chat_template=R1)
    assert encoded(encoder, tokenizer, THOUGHT) == ["<s><|user|>hi<|assistant|>⟦\n\nyo</s>⟧"]
    assert encoded(encoder, tokenizer, chat("hi", "")) == ["<s><|user|>hi<|assistant|>⟦</s>⟧"]
    notes = "\n".join(encoder.notes())
    assert "leaves out the reasoning of 1 answer(s)" in notes and "1 answer(s) are empty" in notes
    assert "generation prompt ends with '<think>\\n', which 2 answer(s) lack" in notes
    assert encoder.counts.empty_answers == 1
    encoder = encoder_of(tokenizer, chat_template=QWEN3)
    encoded(encoder, tokenizer, THOUGHT)
    assert encoder.notes() == []


def test_how_conversations_were_understood_is_said() -> None:
    tokenizer = chat_tokenizer()
    encoder = encoder_of(tokenizer, chat_template=LLAMA3, date="2026-01-02", turns="last")
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    (text,) = encoded(encoder, tokenizer, shared, system="S")
    assert "Today: 02 Jan 2026<|eot|><|start|>system<|end|>\n\nS<|eot|>" in text
    said = "\n".join(encoder.description())
    for part in (
        "chat template: data.chat_template",
        "the date, which is 2026-01-02 (data.date)",
        "human as user, gpt as assistant",
        "messages with from and value; the column 'system' as the first message",
        f"an answer ends with: <|eot|> (id {tokenizer.convert_tokens_to_ids('<|eot|>')})",
        "loss on the last answer of a conversation, with what ends it (data.turns: last)",
    ):
        assert part in said
    encoded(encoder, tokenizer, chat("hi", "yo"), system="S")
    assert any("the column 'system' of 1 row(s) is not used" in note for note in encoder.notes())


def test_the_date_of_two_encoders_in_one_process() -> None:
    tokenizer = chat_tokenizer()
    first, second = (encoder_of(tokenizer, chat_template=LLAMA3, date=day) for day in ("2026-01-02", "2025-12-31"))
    # White space that Jinja drops or keeps at the end
    for end in ("", "\n", "  ", "\n\n  \n", "{{ 1 }}\n\n", "{{ 1 }}\r\n", "{{ 1 }}\n \t"):
        source = LLAMA3 + end
        (dated,) = trained(source, chat("hi", "yo"), date="2026-01-02", loss_on="all")
        # Whoever else uses the template gets today's date.
        own = tokenizer.apply_chat_template(chat("hi", "yo"), chat_template=source, tokenize=False)
        assert dated.replace("⟦", "").replace("⟧", "") == own.replace(f"{date.today():%d %b %Y}", "02 Jan 2026")
    for encoder, day in ((first, "02 Jan 2026"), (second, "31 Dec 2025"), (first, "02 Jan 2026")):
        assert day in encoded(encoder, tokenizer, chat("hi", "yo"))[0]


@pytest.mark.parametrize("source", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_templates_that_draw_random_numbers_are_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"data\.chat_template: draws random numbers"):
        encoder_of(chat_tokenizer(), chat_template=CHATML + source)


def test_a_tokenizer_with_a_template_of_its_own_for_tools() -> None:
    tokenizer = chat_tokenizer({"default": CHATML, "tool_use": CHATML_TOOLS})
    encoder = encoder_of(tokenizer)
    assert "add" not in encoded(encoder, tokenizer, chat("hi", "yo"))[0]
    assert "add" in encoded(encoder, tokenizer, chat("hi", "yo"), tools=[TOOL])[0]
    assert "another one for rows with tools" in encoder.description()[0]


def test_loss_on_all_keeps_the_whole_conversation() -> None:
    (text,) = trained(QWEN3, TWO, loss_on="all")
    assert text.count("⟦") == 1 and text.endswith(
        "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nfine<|im_end|>\n⟧"
    )


def test_a_template_that_writes_nothing_is_refused_with_a_sentence() -> None:
    with pytest.raises(DataError, match="leaves out message 1"):
        trained("{{ messages[9] }}", chat("hi", "yo"))
