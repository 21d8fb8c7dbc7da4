"""The arguments of a call, held to their JSON schema in whatever notation they are written."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any

from .lark import ANY, Rules, json_value, quoted
from .notations import Params

# White space between the words of JSON; without a limit a weak model writes it for ever.
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"
# A number of this many states takes a tenth of a second.
MOST_STATES = 10_000
# Values of one function, so that schemas that refer to themselves come to an end.
MOST_VALUES = 2000
# The escapes in strings that mean the same in JSON and in Python.
ESCAPES = 'nrbtf\\"'
# Of a schema: what says nothing about values, and what a notation of its own can be held to.
_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment", "$defs"}
_NOTES |= {"definitions", "$schema", "$id", "x-guidance"}
_STRING = {"type", "enum", "const", "pattern", "minLength", "maxLength"}
_OBJECT = {"type", "properties", "required", "additionalProperties"}
_KEY = r" /[\w.-]{1,64}/ "
_JSON_TYPES = ("integer", "number", "boolean", "null")


class Unwritable(Exception):
    """A schema to which no answer in this notation can be held."""


def schema_value(schema: Any, escapes: str | None = None) -> str:
    """What a JSON schema allows, written as JSON."""
    if not isinstance(schema, Mapping):
        schema = {} if schema else {"not": {}}
    _check_multiples(schema)
    options: dict[str, Any] = {"whitespace_pattern": WHITE_SPACE}
    if escapes is not None:
        options["json_allowed_escapes"] = escapes
    return json_value({**schema, "x-guidance": options})


def _check_multiples(schema: Any) -> None:
    """The states that multiples of a number take are as many as it, without its factors 2 and 5."""
    if isinstance(schema, Mapping):
        number = schema.get("multipleOf", 1)
        if type(number) in (int, float) and 0 < number < math.inf:
            digits = Decimal(repr(number)).normalize().as_tuple().digits
            states = int("".join(map(str, digits)))
            for factor in (2, 5):
                while states % factor == 0:
                    states //= factor
            if states > MOST_STATES:
                raise Unwritable(f"multipleOf {number} has too many states")
        schema = list(schema.values())
    if isinstance(schema, (list, tuple)):
        for item in schema:
            _check_multiples(item)


def json_arguments(schema: Mapping[str, Any]) -> str:
    return schema_value({"type": "object", **schema})


def one_by_one(rules: Rules, params: Params, schema: Mapping[str, Any], strict: bool) -> str:
    """The arguments that `schema` allows, each written on its own.

    What cannot be held to in this notation is `Unwritable` if `strict`, and free otherwise.
    """
    return _Arguments(rules, params, schema, strict).object(schema, params.each, params.between)


class _Arguments:
    def __init__(self, rules: Rules, params: Params, root: Mapping[str, Any], strict: bool) -> None:
        self._rules = rules
        self._params = params
        self._strict = strict
        self._root = root
        self._defs = {key: root[key] for key in ("$defs", "definitions") if key in root}
        self._name = r"[\w.-]+" if params.strings == "raw" else r"\w+"
        self._values = 0

    def object(self, schema: Mapping[str, Any], each: str, between: str) -> str:
        """The properties in the order of the schema, the optional ones or not."""
        self._only(schema, _OBJECT)
        if not schema.get("properties"):
            none = self._strict or schema.get("additionalProperties") is False
            return '""' if none else self._any_properties(each, between)
        required = set(schema.get("required", ()))
        if self._strict and not required <= set(schema["properties"]):
            raise Unwritable("it requires properties that it does not define")
        before, after = each.split("VALUE")
        separator = self._rules.exactly(between)
        first, later = '""', '""'  # what may follow when nothing is written yet, and when it is
        for key, value in reversed(schema["properties"].items()):
            if not re.fullmatch(self._name, key):
                raise Unwritable(f"the name {key!r} cannot be written")
            one = self._rules.rule(
                f"{self._rules.exactly(before.replace('KEY', key))} {self._value(value, after)}"
            )
            following = self._rules.rule(later)
            alone, joined = f"{one} {following}", f"{separator} {one} {following}"
            if key in required:
                first, later = alone, joined
            else:
                first, later = f"{alone} | {self._rules.rule(first)}", f"{joined} | {following}"
        return first

    def _any_properties(self, each: str, between: str) -> str:
        before, after = each.split("VALUE")
        head = [self._rules.exactly(part) for part in before.split("KEY")]
        one = self._rules.rule(f"{_KEY.join(head)} {self._value({'type': 'string'}, after)}")
        return f"({one} ({self._rules.exactly(between)} {one})*)?"

    def _value(self, schema: Any, after: str) -> str:
        """A value, and the text after it."""
        self._values += 1
        if self._values > MOST_VALUES:
            raise Unwritable("it is too large, or refers to itself")
        written = self._rules.exactly(after)
        if self._params.strings == "json":
            return f"{schema_value(self._with_defs(schema), ESCAPES)} {written}"
        schema = self._resolved(schema)
        kind = schema.get("type")
        literals = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if kind == "string" or (literals and all(isinstance(item, str) for item in literals)):
            return self._string(schema, literals, after)
        if kind in _JSON_TYPES or (kind in ("array", "object") and self._params.strings == "raw"):
            return f"{schema_value(self._with_defs(schema))} {written}"
        if kind == "array" and self._params.nested:
            self._only(schema, {"type", "items"})
            item = self._rules.rule(self._value(schema.get("items", {}), ""))
            return f'"[" ({item} ("," {item})*)? "]" {written}'
        if kind == "object" and self._params.nested:
            inner = self._rules.rule(self.object(schema, self._params.each, self._params.between))
            return f'"{{" {inner} "}}" {written}'
        if self._strict:
            raise Unwritable(f"a value of type {kind or 'any'} cannot be held to it")
        return self._string({"type": "string"}, [], after)

    def _string(self, schema: Mapping[str, Any], literals: list[str], after: str) -> str:
        self._only(schema, _STRING)
        content = ANY
        if self._params.strings == "raw" and schema.get("type") != "string":
            # Parsers take what reads as another type for one.
            literals = [text for text in literals if not _is_literal(text)]
            if not literals and self._strict:
                raise Unwritable("its texts would be read as values of other types")
        if literals:
            content = " | ".join(quoted(text) for text in literals)
        if "minLength" in schema or "maxLength" in schema:
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            content = f"({content}) & /(?s:.{{{least},{most}}})/"
        if "pattern" in schema:
            content = f"({content}) & ({_pattern(schema['pattern'])})"
        if self._params.null_is_none:
            content = f"({content}) & ~/[nN][uU][lL][lL]/"
        if self._params.strings == "raw":
            return self._rules.until(after, content)
        mark = self._params.strings
        return f"{self._rules.exactly(mark)} {self._rules.until(mark + after, content)}"

    def _with_defs(self, schema: Any) -> Any:
        return {**schema, **self._defs} if isinstance(schema, Mapping) else schema

    def _resolved(self, schema: Any) -> Mapping[str, Any]:
        """The schema, without a reference to a definition."""
        for _ in range(32):
            if not isinstance(schema, Mapping):
                break
            if not str(schema.get("$ref", "")).startswith("#/"):
                return schema
            reference, schema = schema["$ref"], self._root
            for key in reference[2:].split("/"):
                schema = schema.get(key, {})
        if self._strict:
            raise Unwritable("a property has no schema")
        return {}

    def _only(self, schema: Mapping[str, Any], keywords: set[str]) -> None:
        unknown = sorted(set(schema) - keywords - _NOTES)
        if self._strict and unknown:
            raise Unwritable(f"{', '.join(unknown)} cannot be held to")


def _is_literal(text: str) -> bool:
    """Whether the text reads as JSON or as a Python literal."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            read(text)
            return True
    return False


def _pattern(pattern: str) -> str:
    """The texts in which a JSON schema's `pattern` is found, as a terminal."""
    from llguidance import regex_to_lark

    begin = "" if pattern.startswith("^") else ANY
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else ANY
    body = pattern.removeprefix("^").removesuffix("" if end else "$")
    if "|" in body and not (begin and end):
        raise Unwritable(f"the pattern {pattern!r} has alternatives with anchors")
    return f"{begin} /{regex_to_lark(body, 'dw')}/ {end}"
