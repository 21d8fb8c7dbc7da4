"""What a grammar allows is valid, and what is valid it allows; in every notation of calls."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from optiq.chat.notation import Notation, named, notation
from optiq.chat.reader import Reader, Text
from optiq.errors import OptiqError, RequestError, ServeError
from optiq.serve.engine.request import Guide
from optiq.serve.grammar import AnswerForm, Grammars, Tool
from optiq.serve.grammar.notations import FORMS
from tests.chat.answers import calls_of, read
from tests.chat.templates import SPECIAL, family, wrapped
from tests.tiny import VOCAB, write_tokenizer

SUITE = Path(__file__).parents[3] / "shared/data/jsonschema/tests/draft2020-12"

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["glad", "sad", None]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number", "exclusiveMinimum": -1, "maximum": 2.5},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: list[Any] = [
    PERSON,
    TREE,
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1},
    {"type": "array", "items": {"anyOf": [{"type": "null"}, PERSON]}, "minItems": 1, "maxItems": 2},
    {"type": "string", "pattern": "^[a-c]+-[0-9]{2}$"},
    {"type": "string", "format": "date"},
    {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 100},
    {"type": "array", "prefixItems": [{"const": "x"}, {"type": "integer"}], "items": False},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    """Marks of notations are plain text to it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load(folder)


def words(guide: Guide, size: int) -> np.ndarray | None:
    """The tokens that may come next; None for any."""
    bits = np.zeros(-(-size // 32), np.uint32)
    if not guide.allow(bits):
        assert not bits.any()
        return None
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))


def accepts(guide: Guide, tokens: Iterable[int], ends: set[int], size: int = VOCAB) -> bool:
    """Whether these tokens are allowed one by one, and the answer may end after them."""
    for token in tokens:
        allowed = None if guide.done else words(guide, size)
        if guide.done or (allowed is not None and token not in allowed):
            return False
        guide.accept(token)
    if guide.done:
        return True
    allowed = words(guide, size)
    return allowed is None or ends <= set(allowed.tolist())


def sample(
    guide: Guide, tokenizer: TokenizerWrapper, rng: random.Random, most: int = 300
) -> str | None:
    """What a random model writes, which ends when it can; None if that takes too long."""
    tokens: list[int] = []
    while len(tokens) < most:
        if guide.done:
            break
        allowed = words(guide, VOCAB)
        assert allowed is not None
        assert allowed.size
        assert allowed.max() < len(tokenizer)
        if tokenizer.eos_token_id in allowed and rng.random() < 0.6:
            break
        token = int(allowed[rng.randrange(len(allowed))])
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
        guide.accept(token)
    else:
        return None
    return str(tokenizer.decode(tokens))


def encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def grammars(tokenizer: TokenizerWrapper, known: Notation | None = None) -> Grammars:
    return Grammars(tokenizer, known or notation(tokenizer), VOCAB)


def made(compiled: Callable[[], Guide] | None) -> Guide:
    assert compiled is not None
    return compiled()


def test_300_samples_of_a_random_model_are_all_valid(tiny: TokenizerWrapper) -> None:
    rng = random.Random(0)
    compiled = [grammars(tiny).compile(AnswerForm("json_schema", s)) for s in SCHEMAS]
    done = 0
    for number in range(300):
        which = number % len(SCHEMAS)
        text = sample(made(compiled[which]), tiny, rng)
        if text is not None:
            jsonschema.validate(
                json.loads(text), SCHEMAS[which], format_checker=jsonschema.FormatChecker()
            )
            done += 1
    assert done > 250


def test_json_object(tiny: TokenizerWrapper) -> None:
    compiled = grammars(tiny).compile(AnswerForm("json_object"))
    ends = {tiny.eos_token_id}
    for text, valid in [
        ("{}", True),
        ('{"a": [1, {"b": null}]}', True),
        ('{\n  "a": "é\\n\\u0001"\n}', True),
        ("[]", False),
        ("0", False),
        ('{"a": 1', False),
        ("{'a': 1}", False),
    ]:
        assert accepts(made(compiled), encode(tiny, text), ends) is valid, text


@pytest.mark.parametrize(
    ("form", "valid", "invalid"),
    [
        (AnswerForm("regex", r"[a-c]{2}/\d"), ["ab/1", "cc/9"], ["abc/1", "ab/", "ab/12"]),
        (AnswerForm("choice", ["yes", "no", 'a "b"\n']), ["yes", "no", 'a "b"\n'], ["y", "yesno"]),
        (AnswerForm("lark", 'start: "a" b*\nb: "b" | "c"'), ["a", "abcb"], ["b", "ad"]),
        (AnswerForm("json_schema", True), ["1", "null", '{"a": 1}'], ["", "nul"]),
    ],
)
def test_other_forms(
    tiny: TokenizerWrapper, form: AnswerForm, valid: list[str], invalid: list[str]
) -> None:
    compiled = grammars(tiny).compile(form)
    for text in valid + invalid:
        found = accepts(made(compiled), encode(tiny, text), {tiny.eos_token_id})
        assert found is (text in valid), text


def test_anything_goes(tiny: TokenizerWrapper) -> None:
    tools = (Tool("f"), Tool("g", PERSON))
    for form in (
        AnswerForm(),
        AnswerForm(tools=tools),
        AnswerForm(tools=tools, tool_choice="none"),
    ):
        assert grammars(tiny).compile(form) is None


@pytest.mark.skipif(not SUITE.exists(), reason="the JSON Schema test suite is not here")
def test_the_json_schema_test_suite(tiny: TokenizerWrapper) -> None:
    """No invalid instance is ever allowed. Valid ones that are not have their properties in another
    order, or say 1.0 for an integer."""
    compiler = grammars(tiny)
    found: Counter[str] = Counter()
    for file in sorted(SUITE.glob("*.json")):
        for case in json.loads(file.read_text(encoding="utf-8")):
            try:
                compiled = compiler.compile(AnswerForm("json_schema", case["schema"]))
            except RequestError:
                continue
            found["compiled"] += 1
            for test in case["tests"]:
                text = json.dumps(test["data"], ensure_ascii=False)
                allowed = accepts(made(compiled), encode(tiny, text), {tiny.eos_token_id})
                kind = "valid" if test["valid"] else "invalid"
                found[f"{kind}, {'allowed' if allowed else 'not allowed'}"] += 1
    assert found["invalid, allowed"] == 0
    assert found["compiled"] >= 169
    assert found["valid, allowed"] >= 342
    assert found["valid, not allowed"] <= 22


# Calls of tools.

PRICE = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        "thing": {"enum": ["kite", "null", 'a "b"']},
        "fresh": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 6},
    },
    "required": ["thing"],
    "additionalProperties": False,
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = (Tool("price", PRICE, True), Tool("now", NOW, True))
OPENAI = [
    {"type": "function", "function": {"name": tool.name, "parameters": dict(tool.parameters)}}
    for tool in TOOLS
]
NOTATIONS = sorted({name.partition(",")[0] for name in FORMS})


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


# Reasoning before an answer.


@pytest.fixture(scope="module")
def thinker() -> TokenizerWrapper:
    return family("qwen3")


def ids(tokenizer: TokenizerWrapper, *marks: str) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(mark)) for mark in marks]


def test_a_grammar_begins_after_the_reasoning(thinker: TokenizerWrapper) -> None:
    compiler = grammars(thinker)
    ends = {thinker.eos_token_id}
    begun = compiler.compile(AnswerForm("choice", ["yes"], reasoning=True))
    open = compiler.compile(AnswerForm("choice", ["yes"]))
    thought = "Let me see <tool_call> {x</think>"
    for text, inside, outside in [
        (f"{thought}yes", True, False),
        (f"<think>{thought}yes", True, True),
        ("yes", False, True),
        (f"{thought}no", False, False),
        ("Let me see", False, False),
    ]:
        assert accepts(made(begun), encode(thinker, text), ends) is inside, text
        assert accepts(made(open), encode(thinker, text), ends) is outside, text


def test_an_answer_cannot_end_inside_its_reasoning(thinker: TokenizerWrapper) -> None:
    guide = made(grammars(thinker).compile(AnswerForm("json_object", reasoning=True)))
    allowed = words(guide, VOCAB)
    assert allowed is not None
    assert thinker.eos_token_id not in allowed
    assert set(range(len(thinker))) - {thinker.eos_token_id} == set(allowed.tolist())
    assert not guide.done


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("kind", ["text", "json_object"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_budget_of_reasoning(
    thinker: TokenizerWrapper, budget: int, kind: Any, inside: bool
) -> None:
    form = AnswerForm(kind, reasoning=inside, reasoning_budget=budget)
    guide = made(grammars(thinker).compile(form))
    start, end = ids(thinker, "<think>", "</think>")
    if not inside:
        first = words(guide, VOCAB)
        assert first is None or start in first
        guide.accept(start)
    for token in encode(thinker, "hmm, so")[:budget]:
        allowed = words(guide, VOCAB)
        assert allowed is None or token in allowed
        guide.accept(token)
    assert words(guide, VOCAB) == [end]
    guide.accept(end)
    allowed = words(guide, VOCAB)
    if kind == "text":
        assert allowed is None
    else:
        assert allowed is not None
        assert {thinker.decode([t])[0] for t in allowed.tolist()} == {"{"}


def test_reasoning_that_ends_by_itself_keeps_to_its_budget(thinker: TokenizerWrapper) -> None:
    guide = made(grammars(thinker).compile(AnswerForm(reasoning=True, reasoning_budget=4)))
    start, end = ids(thinker, "<think>", "</think>")
    for token in [*encode(thinker, "ab"), end, *encode(thinker, "many words of text"), start]:
        assert words(guide, VOCAB) is None
        guide.accept(token)
    assert words(guide, VOCAB) is None
    guide.accept(encode(thinker, "a")[0])
    assert words(guide, VOCAB) == [end]


def test_harmony_reasons_in_its_own_channel() -> None:
    tokenizer = family("harmony")
    compiler = grammars(tokenizer)
    ends = {tokenizer.eos_token_id}
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    final = '<|channel|>final<|message|>{"name": "Ada", "age": 36}'
    compiled = compiler.compile(AnswerForm("json_schema", PERSON))
    for text, valid in [
        (final, True),
        (thought + final, True),
        (thought, False),
        ('{"name": "Ada", "age": 36}', False),
        (final.replace("36", "360"), False),
    ]:
        assert accepts(made(compiled), encode(tokenizer, text), ends) is valid, text
    budget = made(compiler.compile(AnswerForm("json_schema", PERSON, reasoning_budget=3)))
    tokens = encode(tokenizer, "<|channel|>analysis<|message|>abc")
    for token in tokens:
        allowed = words(budget, VOCAB)
        assert allowed is not None
        assert token in allowed
        budget.accept(token)
    assert words(budget, VOCAB) == ids(tokenizer, "<|end|>")


def test_marks_of_several_tokens() -> None:
    special = ("<s>", "</s>", "<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
    tokenizer = wrapped("{{ tools }}{{ messages }}", special)
    guide = made(grammars(tokenizer).compile(AnswerForm(reasoning=True, reasoning_budget=2)))
    for token in encode(tokenizer, "ab"):
        guide.accept(token)
    forced = []
    while (allowed := words(guide, VOCAB)) is not None:
        (token,) = allowed.tolist()
        forced.append(token)
        guide.accept(token)
    assert tokenizer.decode(forced) == "<|close|>think<|sep|>"


# Vocabularies, errors, and company.


@pytest.mark.parametrize("vocabulary", [VOCAB - 40, VOCAB, VOCAB + 1, VOCAB + 999])
def test_only_tokens_of_both_tokenizer_and_embedding(
    tiny: TokenizerWrapper, vocabulary: int
) -> None:
    compiler = Grammars(tiny, notation(tiny), vocabulary)
    for form in (
        AnswerForm("lark", "start: /(?s:.*)/"),
        AnswerForm("lark", "start: <[*]>*"),
        AnswerForm("json_object"),
    ):
        allowed = words(made(compiler.compile(form)), vocabulary)
        assert allowed is not None
        assert allowed.max() < min(vocabulary, len(tiny))


def test_every_end_of_an_answer_is_one(tiny: TokenizerWrapper) -> None:
    tiny.eos_token_ids = {tiny.eos_token_id, 0}
    try:
        compiled = grammars(tiny).compile(AnswerForm("choice", ["yes"]))
        assert accepts(made(compiled), encode(tiny, "yes"), {tiny.eos_token_id, 0})
    finally:
        tiny.eos_token_ids = {tiny.eos_token_id}


def test_a_guide_is_done_when_nothing_can_follow(tiny: TokenizerWrapper) -> None:
    guide = made(grammars(tiny).compile(AnswerForm("choice", ["yes"])))
    for token in encode(tiny, "yes"):
        assert not guide.done
        guide.accept(token)
    assert guide.done


def test_guides_of_one_form_do_not_share_their_state(tiny: TokenizerWrapper) -> None:
    compiled = grammars(tiny).compile(AnswerForm("regex", "ab"))
    one, other = made(compiled), made(compiled)
    one.accept(encode(tiny, "a")[0])
    assert words(one, VOCAB).tolist() == encode(tiny, "b")  # type: ignore[union-attr]
    assert encode(tiny, "a")[0] in words(other, VOCAB)  # type: ignore[operator]


def test_a_token_against_the_grammar_ends_that_answer(tiny: TokenizerWrapper) -> None:
    guide = made(grammars(tiny).compile(AnswerForm("choice", ["yes"])))
    with pytest.raises(ServeError, match="the grammar cannot be followed"):
        guide.accept(encode(tiny, "n")[0])


def deep(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("form", "param", "reason"),
    [
        (AnswerForm("json_schema", {"not": {}}), "response_format", "not"),
        (AnswerForm("json_schema", False), "response_format", "not"),
        (AnswerForm("json_schema", {"type": "strin"}), "response_format", "strin"),
        (AnswerForm("json_schema", {"$ref": "http://a/b"}), "response_format", "http://a/b"),
        (AnswerForm("json_schema", {"$ref": "#"}), "response_format", "followed"),
        (AnswerForm("json_schema", {"enum": []}), "response_format", "Unsatisfiable"),
        (AnswerForm("json_schema", deep(300)), "response_format", ""),
        (AnswerForm("json_schema", deep(50_000)), "response_format", "too deeply"),
        (AnswerForm("json_schema", {"enum": ["x" * 2**21]}), "response_format", "the limit is"),
        (AnswerForm("json_schema", {"multipleOf": 999983}), "response_format", "too many states"),
        (AnswerForm("regex", "(?=a)b"), "response_format", "look-around"),
        (AnswerForm("regex", "("), "response_format", "unclosed"),
        (AnswerForm("regex", "\ud800"), "response_format", ""),
        (AnswerForm("lark", "start: ("), "response_format", "Expected"),
        (AnswerForm("lark", "start: x\nx: x"), "response_format", "followed"),
        (AnswerForm(tools=TOOLS, tool_choice="other"), "tool_choice", "no tool 'other'"),
        (AnswerForm(tools=(Tool("a b", {}, True),)), "tools", "a name has"),
    ],
)
def test_what_cannot_be_held_to_is_refused(
    tiny: TokenizerWrapper, form: AnswerForm, param: str, reason: str
) -> None:
    with pytest.raises(RequestError) as caught:
        grammars(tiny).compile(form)
    assert caught.value.param == param
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    if reason not in ("look-around", "unclosed"):
        assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["json_tools", "qwen3_coder", "gemma4", "pythonic"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": [1]},
        {"properties": {"a": 3}},
        {"properties": {"a": {"enum": 3}}},
        {"properties": {"a": {"type": "string", "pattern": 5}}},
        {"properties": {"a b>": {"type": "string"}}},
        {"required": 5},
        {"type": "array"},
        {"properties": {"a": {"multipleOf": float("inf")}, "b": {"multipleOf": 0}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {
            "properties": {"a": {"$ref": "#/$defs/a"}},
            "$defs": {"a": {"properties": {k: {"$ref": "#/$defs/a"} for k in "xy"}}},
        },
        {
            "properties": {"a": {"$ref": "#/$defs/a"}},
            "$defs": {
                "a": {"type": "object", "properties": {k: {"$ref": "#/$defs/a"} for k in "xy"}}
            },
        },
        [1],
        5,
    ],
)
def test_any_json_may_stand_where_a_schema_should(
    tiny: TokenizerWrapper, name: str, parameters: Any
) -> None:
    """What is no schema, or none that the notation can hold to: refused if strict, else free."""
    known = named(name)
    compiler = grammars(tiny, known)
    try:
        compiler.compile(AnswerForm(tools=(Tool("f", parameters, True),), tool_choice="f"))
    except RequestError as error:
        assert error.param == "tools"  # noqa: PT017
    loose = compiler.compile(AnswerForm(tools=(Tool("f", parameters),), tool_choice="f"))
    assert words(made(loose), VOCAB) is not None


def test_a_tokenizer_that_is_written_in_python(tiny: TokenizerWrapper) -> None:
    class Slow:
        eos_token_ids = tiny.eos_token_ids
        get_vocab = tiny.get_vocab
        encode = tiny.encode

    compiler = Grammars(Slow(), named("json_tools"), VOCAB)
    assert compiler.compile(AnswerForm(tools=TOOLS, tool_choice="none")) is None
    with pytest.raises(RequestError, match="written in Python"):
        compiler.compile(AnswerForm("json_object"))


def test_without_llguidance(tiny: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptiqError, match=r"pip install 'optiq-mlx\[serve\]'"):
        grammars(tiny)


def test_every_notation_of_calls_has_a_form() -> None:
    for name in ("qwen3", "deepseek_v31", "mistral", "harmony", "llama3"):
        assert notation(family(name)).name in FORMS
    assert set(SPECIAL) > {"qwen3"}
    assert isinstance(Reader(named("json_tools")), Reader)
