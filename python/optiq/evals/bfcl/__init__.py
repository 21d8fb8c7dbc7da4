"""BFCL-v3 "simple": read the tool call out of an answer and judge it by its syntax tree.

    calls = template_calls(answer, tokenizer, tools) or parse(answer)
    reason = str(calls) if isinstance(calls, ParseError) else check(function, possible, calls)

`reason` is None if the call is right. Pure: no model, no files.
"""

from ...chat.calls import Call, ParseError
from ...chat.notations import template_calls
from ...chat.parser import parse
from .checker import check

__all__ = ["Call", "ParseError", "check", "parse", "template_calls"]
