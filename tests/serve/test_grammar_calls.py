"""Calls are held to the schemas of their tools, in the notation of each model."""

from __future__ import annotations

import random
from typing import Any

import jsonschema
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from optiq.chat.notation import Notation, named, notation
from optiq.chat.reader import Text
from optiq.errors import RequestError
from optiq.serve.grammar import AnswerForm, Tool
from optiq.serve.grammar.notations import FORMS
from tests.chat.answers import calls_of, read
from tests.chat.templates import family
from tests.serve.guided import (
    PERSON,
    TOOLS,
    accepts,
    encode,
    grammars,
    made,
    marks_as_text,
    sample,
    words,
)
from tests.tiny import VOCAB

OPENAI = [
    {"type": "function", "function": {"name": tool.name, "parameters": dict(tool.parameters)}}
    for tool in TOOLS
]
NOTATIONS = sorted({name.partition(",")[0] for name in FORMS})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    return marks_as_text(tmp_path_factory.mktemp("tokenizer"))


def check_calls(known: Notation, text: str) -> list[Any]:
    parts, count = read(known, text, OPENAI)
    calls = calls_of(parts)
    assert len(calls) == count
    for name, arguments in calls:
        jsonschema.validate(arguments, next(t.parameters for t in TOOLS if t.name == name))
    assert not any(isinstance(part, Text) and part.text.strip() for part in parts), text
    return calls


@pytest.mark.parametrize("name", NOTATIONS)
@pytest.mark.parametrize("choice", ["required", "price", "one"])
def test_a_random_model_calls_well(tiny: TokenizerWrapper, name: str, choice: str) -> None:
    """In every notation, what is sampled is read back as calls with valid arguments."""
    known = named(name)
    one = choice == "one"
    form = AnswerForm(
        tools=TOOLS, tool_choice="required" if one else choice, parallel=choice == "required"
    )
    compiled = grammars(tiny, known).compile(form)
    rng = random.Random(name)
    counts = []
    for _ in range(8):
        text = sample(made(compiled), tiny, rng)
        if text is None:
            continue
        calls = check_calls(known, text)
        counts.append(len(calls))
        if choice == "price":
            assert {name for name, _ in calls} == {"price"}
    # Where reasoning is a message, a random model finds no end of it.
    assert len(counts) >= (1 if known.channels else 4)
    assert min(counts) >= 1
    if choice != "required":
        assert max(counts) == 1


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v31", "mistral", "harmony", "llama3"])
def test_marks_that_are_tokens(name: str) -> None:
    """A model writes the mark as the token that it is, and its letters are not the mark."""
    tokenizer = family(name)
    known = notation(tokenizer)
    compiled = grammars(tokenizer, known).compile(AnswerForm(tools=TOOLS, tool_choice="required"))
    rng = random.Random(1)
    texts = [sample(made(compiled), tokenizer, rng, 400) for _ in range(6)]
    done = [text for text in texts if text is not None]
    assert done
    for text in done:
        assert check_calls(known, text)
    marks = [form.start for form in known.calls if form.start]
    if name == "qwen3":
        first = words(made(compiled), VOCAB)
        assert first is not None
        opened = {tokenizer.convert_tokens_to_ids(mark) for mark in (*marks, "<think>")}
        assert set(first.tolist()) == opened


CALL = '<tool_call>\n{"name": "price", "arguments": {"count": 3, "thing": "kite"}}\n</tool_call>'


@pytest.mark.parametrize("kind", ["text", "token"])
def test_auto_with_strict_tools(tiny: TokenizerWrapper, kind: str) -> None:
    """Text as the model likes, but a call that it begins is held to its schema."""
    tokenizer = tiny if kind == "text" else family("qwen3")
    compiled = grammars(tokenizer).compile(AnswerForm(tools=TOOLS))
    ends = {tokenizer.eos_token_id}
    for text, valid in [
        ("", True),
        ("Just text, with < and <tool_cal in it.", True),
        (CALL, True),
        (f"I look it up.\n{CALL}", True),
        (f"I look it up.\n{CALL}\n{CALL} and so on", True),
        ("I look it up. <tool_call>", False),
        (CALL.replace("3", "30"), False),
        (CALL.replace("price", "other"), False),
        (CALL.replace('"count"', '"color"'), False),
        (f"{CALL} <tool_call> is what I wrote", False),
    ]:
        found = accepts(made(compiled), encode(tokenizer, text), ends)
        assert found is valid, text


def test_one_call_at_most(tiny: TokenizerWrapper) -> None:
    loose = tuple(Tool(tool.name, tool.parameters) for tool in TOOLS)
    for tools in (TOOLS, loose):
        compiled = grammars(tiny).compile(AnswerForm(tools=tools, parallel=False))
        for text, valid in [("hi", True), (f"hi {CALL}", True), (f"{CALL}\n{CALL}", False)]:
            assert accepts(made(compiled), encode(tiny, text), {tiny.eos_token_id}) is valid


def test_a_call_or_an_answer_of_a_form(tiny: TokenizerWrapper) -> None:
    compiled = grammars(tiny).compile(AnswerForm("json_schema", PERSON, tools=TOOLS))
    person = '{"name": "Ada", "age": 36}'
    for text, valid in [(CALL, True), (person, True), ("hi", False), (CALL + person, False)]:
        assert accepts(made(compiled), encode(tiny, text), {tiny.eos_token_id}) is valid


def test_a_tool_that_is_not_strict_is_held_to_what_can_be(tiny: TokenizerWrapper) -> None:
    hard = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    compiled = grammars(tiny).compile(AnswerForm(tools=(Tool("f", hard),), tool_choice="f"))
    call = '<tool_call>\n{"name": "f", "arguments": {"b": [1]}}\n</tool_call>'
    assert accepts(made(compiled), encode(tiny, call), {tiny.eos_token_id})
    with pytest.raises(RequestError, match=r"tool 'f' cannot be strict: .*not") as caught:
        grammars(tiny).compile(AnswerForm(tools=(Tool("f", hard, True),), tool_choice="f"))
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "format": "date"}, "format"),
        ({"type": ["string", "boolean"]}, "any type|cannot be held"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "cannot be held"),
        ({"type": "string", "pattern": "^a|b$"}, "alternatives"),
    ],
)
def test_what_a_notation_of_tags_cannot_hold_to(
    tiny: TokenizerWrapper, schema: Any, reason: str
) -> None:
    known = named("qwen3_coder")
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    strict = AnswerForm(tools=(Tool("f", parameters, True),), tool_choice="f")
    with pytest.raises(RequestError, match=reason) as caught:
        grammars(tiny, known).compile(strict)
    assert caught.value.param == "tools"
    loose = AnswerForm(tools=(Tool("f", parameters),), tool_choice="f")
    text = sample(made(grammars(tiny, known).compile(loose)), tiny, random.Random(0), 2000)
    assert text is None or read(known, text)[1] == 1


@pytest.mark.parametrize("name", ["qwen3_coder", "glm47", "minimax_m2", "gemma4", "pythonic"])
def test_nested_values_in_notations_of_tags(tiny: TokenizerWrapper, name: str) -> None:
    schema = {
        "type": "object",
        "properties": {
            "where": {
                "type": "object",
                "properties": {"zip": {"type": "string", "pattern": "^[0-9]{3}$"}},
                "required": ["zip"],
                "additionalProperties": False,
            },
            "sizes": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}},
        },
        "required": ["where", "sizes"],
        "additionalProperties": False,
    }
    known = named(name)
    form = AnswerForm(tools=(Tool("f", schema, True),), tool_choice="f")
    rng = random.Random(3)
    done = 0
    for _ in range(8):
        text = sample(made(grammars(tiny, known).compile(form)), tiny, rng)
        if text is None:
            continue
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        ((called, arguments),) = calls_of(read(known, text, tools)[0])
        assert called == "f"
        jsonschema.validate(arguments, schema)
        done += 1
    assert done >= 3


def test_text_that_looks_like_its_end(tiny: TokenizerWrapper) -> None:
    """The mark after a value overlaps with itself: it ends where it first stands."""
    known = named("qwen3_coder")
    schema = {"properties": {"a": {"type": "string", "maxLength": 40}, "b": {"type": "integer"}}}
    form = AnswerForm(tools=(Tool("f", schema, True),), tool_choice="f")
    text = "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n<parameter=b>\n3\n"
    text += "</parameter>\n</function>\n</tool_call>"
    compiled = grammars(tiny, known).compile(form)
    assert accepts(made(compiled), encode(tiny, text), {tiny.eos_token_id})
    assert calls_of(read(known, text)[0])[0][0] == "f"
