"""BFCL-v3 "simple": whether the tool call in an answer is the right one.

    calls = parse(answer)
    reason = str(calls) if isinstance(calls, ParseError) else check(function, possible, calls)

`reason` is None if the call is right. Pure: no model, no files. `chat.parser` reads what the
handlers of bfcl-eval read, and reads it alike: {"name of the function": {...}} is a call, a broken
call beside a whole one is passed over, a bare name in Python syntax is its text.
"""

from ...chat.calls import Call, ParseError
from ...chat.parser import parse
from .checker import check

__all__ = ["Call", "ParseError", "check", "parse"]
