"""What a grammar allows is valid; what it cannot hold to is refused before an answer begins."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from optiq.chat.notation import named, notation
from optiq.chat.reader import Reader
from optiq.errors import OptiqError, RequestError, ServeError
from optiq.serve.grammar import AnswerForm, Grammars, Tool
from optiq.serve.grammar.notations import FORMS
from tests.chat.templates import SPECIAL, family
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

SUITE = Path(__file__).parents[3] / "shared/data/jsonschema/tests/draft2020-12"

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
    return marks_as_text(tmp_path_factory.mktemp("tokenizer"))


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
