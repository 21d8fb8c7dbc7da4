"""Every notation of a call gives the same call; every other text gives a reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.chat.calls import Call, ParseError
from optiq.chat.parser import parse

ARGUMENTS = {"n": 10, "x": 2.5, "name": "it's", "on": True, "list": [1, [2]], "of": {"k": None}}
JSON = json.dumps(ARGUMENTS)
PYTHON = ", ".join(f"{name}={value!r}" for name, value in ARGUMENTS.items())
CALL = Call("math.area", ARGUMENTS)

NOTATIONS = {
    "hermes": '<tool_call>\n{"name": "math.area", "arguments": JSON}\n</tool_call>',
    "hermes, not closed": '<tool_call>\n{"name": "math.area", "arguments": JSON}',
    "hermes after a thought": '<think>\n<tool_call>{"no"\n</think>\n<tool_call>'
    '{"arguments": JSON, "name": "math.area"}</tool_call><|im_end|>',
    "hermes with prose": 'Sure.\n<tool_call>{"name": "math.area", "arguments": JSON}</tool_call>',
    "object": '{"name": "math.area", "arguments": JSON}',
    "list": '[{"name": "math.area", "arguments": JSON}]',
    "text of an object": '{"name": "math.area", "arguments": TEXT}',
    "openai": '{"tool_calls": [{"type": "function", "function": '
    '{"name": "math.area", "arguments": TEXT}}]}',
    "llama": '{"name": "math.area", "parameters": JSON}<|eot_id|>',
    "llama, tagged": '<|python_tag|>{"type": "function", "name": "math.area", "parameters": JSON}'
    "<|eom_id|>",
    "llama, custom": "<function=math.area>JSON</function>",
    "llama, function as name": '{"function": "math.area", "parameters": JSON}',
    "llama, in Python's words": "{'name': 'math.area', 'parameters': LITERAL}",
    "mistral": '[TOOL_CALLS] [{"name": "math.area", "arguments": JSON}]</s>',
    "mistral, new": "[TOOL_CALLS]math.area[ARGS]JSON",
    "mistral, newer": "[TOOL_CALLS]math.area[CALL_ID]a1b2c3d4e[ARGS]JSON",
    "mistral, newest": "[TOOL_CALLS]math.areaJSON</s>",
    "keyed by name": '[{"math.area": JSON}]',
    "prose around": 'I call {"name": "math.area", "arguments": JSON} now.',
    "fenced json": 'Here:\n```json\n{"name": "math.area", "arguments": JSON}\n```\nDone.',
    "python": "math.area(PYTHON)",
    "python list": "[math.area(PYTHON)]",
    "python in backticks": "`math.area(PYTHON)`",
    "gemma": "```tool_code\nprint(math.area(PYTHON))\n```<end_of_turn>",
    "gemma, with what it expects": "```tool_code\nmath.area(PYTHON)\n```\n```tool_output\n42\n```",
    "assigned": "```python\nresult = math.area(PYTHON)\nprint(result)\n```",
}


@pytest.mark.parametrize("notation", NOTATIONS)
def test_the_same_call(notation: str) -> None:
    text = NOTATIONS[notation].replace("JSON", JSON).replace("PYTHON", PYTHON)
    text = text.replace("LITERAL", repr(ARGUMENTS))
    assert parse(text.replace("TEXT", json.dumps(JSON))) == [CALL]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]',
        'first {"name": "f", "arguments": {}}, then {"name": "g", "arguments": {}}',
        "[f(), g()]",
        "f(), g()",
        "```tool_code\nf()\ng()\n```",
    ],
)
def test_several_calls_in_order(text: str) -> None:
    assert parse(text) == [Call("f", {}), Call("g", {})]


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("1", 1),
        ("1.0", 1.0),
        ("-2", -2),
        ("True", True),
        ("None", None),
        ("true", "true"),
        ("'a'", "a"),
        ("(1, 'b')", (1, "b")),
        ("2 * 3.5 - 1", 6.0),
        ("4 / 2", 2.0),
        ("date(2024, 1)", "date(2024, 1)"),
        ("g(b=1)", {"g": {"b": 1}}),
        ("x[0]", "x[0]"),
        ("{'k': [1]}", {"k": [1]}),
    ],
)
def test_python_values_keep_their_type(source: str, value: object) -> None:
    calls = parse(f"f(a={source})")
    assert isinstance(calls, list)
    assert repr(calls[0].arguments["a"]) == repr(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("I cannot help with that.", "neither JSON nor"),
        ("<think>let me see, f(a=1)", "never ends"),
        ("f(1)", "without names"),
        ("f(**{'a': 1})", "without names"),
        ("f(a=lambda: 1)", "only running it"),
        ("f(a=1 / 0)", "arithmetic"),
        (f"f(a={'9' * 4000} * {'9' * 4000})", "arithmetic"),
        ("import os", "statements besides"),
        ("5", "not a call"),
        ('{"answer": 5}', "no name and arguments"),
        ('{"name": "f", "arguments": "{a"}', "not JSON"),
        ('{"name": "f", "arguments": [1]}', "not an object"),
        ("{1: {}}", "no name and arguments"),
        ("{[]: {}}", "values besides"),
        ("[" * 100_000, "too deeply"),
        ("-" * 100_000 + "1", "too deeply"),
    ],
)
def test_no_call_is_a_reason(text: str, reason: str) -> None:
    error = parse(text)
    assert isinstance(error, ParseError)
    assert reason in str(error)
    assert "\n" not in str(error)


def test_a_broken_block_beside_a_whole_one_is_passed_over() -> None:
    """As bfcl-eval's handler of Qwen and Hermes has it."""
    text = (
        '<tool_call>{"name": "f",</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>'
    )
    assert parse(text) == [Call("g", {})]


def test_no_calls_are_no_error() -> None:
    assert parse("[]") == []


FRAGMENTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "```json\n", "```"]
FRAGMENTS += [
    '{"name": "f", ',
    '"arguments": ',
    "{}",
    "}",
    "f(",
    "a=",
    "1",
    ")",
    "[",
    "]",
    "\x00",
    "{'a': ",
]


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)))
def test_any_text_gives_calls_or_a_reason(text: str) -> None:
    result = parse(text)
    if isinstance(result, ParseError):
        assert result.reason
    else:
        assert all(isinstance(call, Call) for call in result)
