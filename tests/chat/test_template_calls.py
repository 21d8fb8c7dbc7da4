"""Calls in the notations of models' own templates, which mlx-lm's parsers read."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from optiq.chat.calls import Call
from optiq.chat.template_calls import read_calls, template_calls

ARGUMENTS = {"thing": 'a "red" kite, 3', "count": 3, "ratio": 2.5, "sizes": [1, 2]}
CALL = Call("price", ARGUMENTS)
TYPES = {"thing": "string", "count": "integer", "ratio": "number"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "price",
            "parameters": {
                "type": "object",
                "properties": {
                    **{name: {"type": kind} for name, kind in TYPES.items()},
                    "sizes": {"type": "array", "items": {"type": "integer"}},
                },
            },
        },
    }
]

NOTATIONS = {
    "qwen3_coder": """<tool_call>
<function=price>
<parameter=thing>
a "red" kite, 3
</parameter>
<parameter=count>
3
</parameter>
<parameter=ratio>
2.5
</parameter>
<parameter=sizes>
[1, 2]
</parameter>
</function>
</tool_call>""",
    "gemma4": "<|tool_call>call:price{count:3,ratio:2.5,sizes:[1,2],"
    'thing:<|"|>a "red" kite, 3<|"|>}<tool_call|>',
    "glm47": '<tool_call>price<arg_key>thing</arg_key><arg_value>a "red" kite, 3</arg_value>'
    "<arg_key>count</arg_key><arg_value>3</arg_value><arg_key>ratio</arg_key>"
    "<arg_value>2.5</arg_value><arg_key>sizes</arg_key><arg_value>[1, 2]</arg_value></tool_call>",
    "pythonic": "<|tool_call_start|>[price(thing='a \"red\" kite, 3', count=3, ratio=2.5, "
    "sizes=[1, 2])]<|tool_call_end|>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.price:0"
    '<|tool_call_argument_begin|>{"thing": "a \\"red\\" kite, 3", "count": 3, "ratio": 2.5, '
    '"sizes": [1, 2]}<|tool_call_end|><|tool_calls_section_end|>',
    "json_tools": '<tool_call>{"name": "price", "arguments": {"thing": "a \\"red\\" kite, 3", '
    '"count": 3, "ratio": 2.5, "sizes": [1, 2]}}</tool_call>',
}


def tokenizer(notation: str) -> Any:
    """What a tokenizer of mlx-lm knows of a template with this notation."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{notation}")
    return SimpleNamespace(
        tool_parser=module.parse_tool_call,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
    )


@pytest.mark.parametrize("notation", NOTATIONS)
def test_a_template_of_its_own(notation: str) -> None:
    answer = f"Let me see.\n{NOTATIONS[notation]}\n"
    assert template_calls(answer, tokenizer(notation), TOOLS) == [CALL]
    assert read_calls(answer, tokenizer(notation), TOOLS) == [CALL]
    assert template_calls(answer + answer, tokenizer(notation), TOOLS) == [CALL, CALL]


@pytest.mark.parametrize("notation", ["qwen3_coder", "gemma4", "kimi_k2", "json_tools"])
def test_a_broken_call_is_passed_over(notation: str) -> None:
    known = tokenizer(notation)
    broken = f"{known.tool_call_start} I would rather not {known.tool_call_end}"
    assert template_calls(broken, known, TOOLS) is None
    assert template_calls(broken + NOTATIONS[notation], known, TOOLS) == [CALL]


def test_where_the_template_has_no_notation_or_was_not_followed() -> None:
    none = SimpleNamespace(tool_parser=None, tool_call_start=None, tool_call_end=None)
    plain = NOTATIONS["json_tools"]
    assert template_calls(plain, none, TOOLS) is None
    assert read_calls(plain, none, TOOLS) == [CALL]
    assert template_calls("price(count=3)", tokenizer("qwen3_coder"), TOOLS) is None
