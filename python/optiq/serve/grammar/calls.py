"""Calls of tools as a grammar, in the notation of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .lark import ANY, Rules
from .notations import CallForm
from .params import json_arguments, one_by_one

_INDEX = " /[0-9]{1,3}/ "
# A function with the schema of its arguments, and whether it must be held to it.
Function = tuple[str, Mapping[str, Any], bool]


def required_calls(
    rules: Rules, form: CallForm, functions: Sequence[Function], several: bool
) -> str:
    """At least one call, and nothing else: an expression."""
    call = _call(rules, form, functions)
    several = several and form.many
    between = rules.exactly(form.between)
    if several and form.inside:
        call = f"{call} ({between} {call})*"
    section = rules.rule(f"{rules.exactly(form.begin)} {call} {rules.exactly(form.end)}")
    if several and not form.inside:
        return f"{section} ({between} {section})*"
    return section


def optional_calls(
    rules: Rules, form: CallForm, functions: Sequence[Function], several: bool
) -> str:
    """Text, in which calls may stand."""
    if not form.begin:  # a call is all of the answer
        text = rules.terminal(f"({ANY}) & ~(/\\s*\\{{/ {ANY})")
        return f"{text} | {required_calls(rules, form, functions, several)}"
    call = _call(rules, form, functions)
    several = several and form.many
    if several and form.inside:
        call = f"{call} ({rules.exactly(form.between)} {call})*"
    section = rules.rule(f"{rules.until(form.begin)} {call} {rules.exactly(form.end)}")
    return f"{section}{'*' if several and not form.inside else '?'} {rules.free(form.begin)}"


def _call(rules: Rules, form: CallForm, functions: Sequence[Function]) -> str:
    calls = []
    for name, schema, strict in functions:
        before, after = form.call.split("ARGUMENTS")
        head = [rules.exactly(part.replace("NAME", name)) for part in before.split("INDEX")]
        if form.params is None:
            arguments = json_arguments(schema)
        else:
            arguments = one_by_one(rules, form.params, schema, strict)
        calls.append(f"{_INDEX.join(head)} {rules.rule(arguments)} {rules.exactly(after)}")
    return rules.rule(" | ".join(calls))
