"""Chats: one BOS, the model's own template where it is complete, documented forms elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from optiq.calibration import load_rows
from optiq.chat.template import ChatText, chat_text, encode
from tests.calibration.conftest import CHATML, GEMMA

Make = Callable[..., TokenizerWrapper]
CHATS = [row for row in load_rows() if "messages" in row]

TALK = {
    "domain": "agent",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How high is the tide?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c-1", "function": {"name": "tide", "arguments": {"port": "Skarn"}}},
                {"id": "c-2", "function": {"name": "tide", "arguments": {"port": "Eskby"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "c-1", "name": "tide", "content": "2.1 m"},
        {"role": "tool", "tool_call_id": "c-2", "name": "tide", "content": "1.4 m"},
        {"role": "assistant", "content": "2.1 m in Skarn, 1.4 m in Eskby."},
    ],
    "tools": [{"type": "function", "function": {"name": "tide", "description": "Tide level"}}],
}
TIDE_CALL = '<tool_call>\n{"name": "tide", "arguments": {"port": "Skarn"}}\n</tool_call>'


def text_of(row: dict[str, Any], tokenizer: TokenizerWrapper) -> ChatText:
    return chat_text(row["messages"], tokenizer, row.get("tools"))


def leaves(value: Any) -> Iterator[str]:
    """Strings of a JSON value: keys and string values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)


@pytest.mark.parametrize("prefix", ["", "<bos>", "\n <bos>", "<bos><bos>"])
def test_a_bos_in_the_template_is_not_doubled(make_tokenizer: Make, prefix: str) -> None:
    tokenizer = make_tokenizer("bpe", prefix + CHATML, "<bos>")
    expected = tokenizer.encode("<bos><|im_start|>user\nhi<|im_end|>\n", add_special_tokens=False)
    chat = chat_text([{"role": "user", "content": "hi"}], tokenizer)
    assert encode(chat.text, tokenizer) == expected


def test_nothing_of_a_row_is_lost(tokenizer: TokenizerWrapper) -> None:
    for row in CHATS:
        text, _ = text_of(row, tokenizer)
        for message in row["messages"]:
            assert message["content"].strip() in text
            for call in message.get("tool_calls", []):
                for leaf in leaves([call["function"]["name"], call["function"]["arguments"]]):
                    assert leaf in text or json.dumps(leaf, ensure_ascii=False)[1:-1] in text
        for tool in row.get("tools", []):
            assert tool["function"]["name"] in text
            assert tool["function"]["description"] in text


def test_a_template_that_ignores_tools_gets_them_as_text(make_tokenizer: Make) -> None:
    text, form = text_of(TALK, make_tokenizer("bpe", CHATML, "<|im_start|>"))
    assert form == "tools as text"
    turns = [turn.split("\n", 1) for turn in text.split("<|im_start|>")[1:]]
    assert [role for role, _ in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[0][1].startswith("Be brief.\n\nTools:\n<tools>\n" + json.dumps(TALK["tools"][0]))
    assert turns[2][1].startswith(TIDE_CALL)
    assert "<tool_response>\n2.1 m\n</tool_response>\n\n<tool_response>\n1.4 m" in turns[3][1]


def test_a_template_without_system_gets_it_in_the_first_user_turn(make_tokenizer: Make) -> None:
    text, form = text_of(TALK, make_tokenizer("unigram", GEMMA, "<bos>"))
    assert form == "merged system"
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nTools:\n")
    assert text.count("<start_of_turn>user") == text.count("<start_of_turn>model") == 2


def test_no_template_at_all_gives_named_turns(make_tokenizer: Make) -> None:
    text, form = text_of(TALK, make_tokenizer("wordpiece", None))
    assert form == "plain"
    assert text.startswith("System: Be brief.\n\nTools:\n")
    assert f"\n\nUser: How high is the tide?\n\nAssistant: {TIDE_CALL}" in text


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{{ messages[99]['content'] }}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "always the same",
    ],
)
def test_a_broken_template_falls_back_to_named_turns(make_tokenizer: Make, template: str) -> None:
    assert text_of(TALK, make_tokenizer("bpe", template))[1] == "plain"


def test_a_system_message_that_a_template_drops_is_merged(make_tokenizer: Make) -> None:
    template = "{% for m in messages if m['role'] != 'system' %}[{{ m['content'] }}]{% endfor %}"
    row = {"messages": TALK["messages"][:2]}
    expected = ("[Be brief.\n\nHow high is the tide?]", "merged system")
    assert text_of(row, make_tokenizer("bpe", template)) == expected


BRACKETS = """\
{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}\
{% for m in messages %}{{ m['content'] }}{% for c in m.tool_calls or [] %}CALL{% endfor %}\
{% endfor %}"""


def test_templates_that_want_arguments_as_json_text_get_it(make_tokenizer: Make) -> None:
    template = BRACKETS.replace("CALL", "[{{ c.function.name + c.function.arguments }}]")
    text, form = text_of(TALK, make_tokenizer("bpe", template))
    assert form == "json arguments"
    assert '[tide{"port": "Skarn"}]' in text


def test_templates_that_want_nine_character_ids_get_them(make_tokenizer: Make) -> None:
    check = "{% if c.id | length != 9 %}{{ raise_exception('length 9!') }}{% endif %}"
    call = check + "[{{ c.id }}{{ c.function | tojson }}]"
    template = BRACKETS.replace("CALL", call).replace(
        "{{ m['content'] }}", "{{ m.tool_call_id }}={{ m['content'] }}"
    )
    text, form = text_of(TALK, make_tokenizer("bpe", template))
    assert form == "nine-character ids"
    assert "[call00000{" in text
    assert "call00001=1.4 m" in text


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }} " + CHATML,
        '{% if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}'
        "{% endif %}{{ date_string }} " + CHATML,
    ],
)
def test_templates_that_print_a_date_print_a_fixed_one(make_tokenizer: Make, template: str) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    text, form = text_of(row, make_tokenizer("bpe", template))
    assert form == "native"
    assert text.startswith("26 Jul 2024 <|im_start|>user")


def test_the_conversation_is_left_alone(tokenizer: TokenizerWrapper) -> None:
    before = json.dumps(TALK)
    text_of(TALK, tokenizer)
    assert json.dumps(TALK) == before
