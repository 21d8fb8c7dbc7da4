"""Calibration rows: what one is, and which part of a conversion sees it.

A row is `{"text"}`, `{"messages", "tools"?}` with messages and tools in the OpenAI shape, or
`{"prompt", "completion"}`, which becomes two messages. `domain` is optional. Other keys are kept
and ignored, except `line`, which `files.load_rows` sets itself.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from ..errors import CalibrationError

DOMAIN = "text"  # of a row that names none
ROLES = ("system", "user", "assistant", "tool")
EVERY = 8
SPLITS = ("calibration", "selection", "heldout")

Row = dict[str, Any]


def split(rows: Iterable[Row], which: str) -> list[Row]:
    """A part of `rows`, in their order: no row is in two of `SPLITS`, and each is in one.

    "calibration" is what scores and rounding see, "selection" what plans are chosen by, "heldout"
    what the result is judged on. Of every 8 rows of a domain the 4th selects and the 8th is held
    out; of a domain with 3 to 7 rows, the last but one and the last; of one with 2, the last is
    held out.
    """
    if which not in SPLITS:
        raise CalibrationError(f"no split is called {which!r}; use one of {', '.join(SPLITS)}")
    rows = list(rows)
    places: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        places[row["domain"]].append(index)
    part = dict.fromkeys(range(len(rows)), "calibration")
    for members in places.values():
        short = len(members) < EVERY
        held = members[1:][-1:] if short else members[EVERY - 1 :: EVERY]
        selecting = members[1:-1][-1:] if short else members[EVERY // 2 - 1 :: EVERY]
        part |= dict.fromkeys(held, "heldout") | dict.fromkeys(selecting, "selection")
    return [row for index, row in enumerate(rows) if part[index] == which]


def check_row(value: object) -> Row:
    """`value` as a valid row, null fields dropped; the CalibrationError names no line."""
    if not isinstance(value, dict):
        _bad(f"the row is {_kind(value)}", 'a JSON object like {"domain": "prose", "text": "..."}')
    row = {key: item for key, item in value.items() if item is not None}
    domain = row.setdefault("domain", DOMAIN)
    if not isinstance(domain, str) or not domain.strip():
        _bad(f"domain is {_show(domain)}", "a non-empty string, or none")
    if "prompt" in row and not ("text" in row or "messages" in row):
        row["messages"] = list(_question(row.pop("prompt"), row.pop("completion", None)))
    if ("text" in row) == ("messages" in row):
        found = "both text and messages" if "text" in row else "neither text nor messages"
        _bad(f"the row has {found}", "text, messages, or prompt and completion")
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            _bad(f"text is {_show(row['text'])}", "a non-empty string")
        if "tools" in row:
            _bad("a text row has tools", "tools only next to messages")
    else:
        row["messages"] = list(_messages(row["messages"]))
        for index, tool in enumerate(_list(row.get("tools", []), "tools")):
            _function(tool, f"tools[{index}]")
    return row


def _question(prompt: object, completion: object) -> Iterator[dict[str, Any]]:
    for role, name, said in (("user", "prompt", prompt), ("assistant", "completion", completion)):
        if not isinstance(said, str) or not said.strip():
            _bad(f"{name} is {_show(said)}", "a non-empty string")
        yield {"role": role, "content": said}


def _messages(value: object) -> Iterator[dict[str, Any]]:
    messages = _list(value, "messages")
    if not messages:
        _bad("messages is empty", "at least one message")
    call_ids: set[str] = set()
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            _bad(f"{where} is {_kind(message)}", "an object with role and content")
        message = {key: item for key, item in message.items() if item is not None}
        role = message.get("role")
        if role not in ROLES:
            _bad(f"{where}.role is {_show(role)}", "one of " + ", ".join(ROLES))
        if "tool_calls" in message:
            if role != "assistant":
                _bad(f"{where} has tool_calls in a {role} turn", "them in assistant turns only")
            message["tool_calls"] = list(_calls(message["tool_calls"], f"{where}.tool_calls"))
            call_ids.update(call["id"] for call in message["tool_calls"] if "id" in call)
        elif "content" not in message:
            _bad(f"{where} has no content", "a string (null only next to tool_calls)")
        if not isinstance(message.get("content", ""), str):
            _bad(f"{where}.content is {_kind(message['content'])}", "a string")
        answers = message.get("tool_call_id")
        if answers is not None and (not isinstance(answers, str) or answers not in call_ids):
            _bad(
                f"{where}.tool_call_id is {_show(answers)}",
                "the id of a tool call in an earlier message",
            )
        yield message


def _calls(value: object, where: str) -> Iterator[dict[str, Any]]:
    calls = _list(value, where)
    if not calls:
        _bad(f"{where} is empty", "at least one call, or no tool_calls key")
    for index, call in enumerate(calls):
        here = f"{where}[{index}]"
        function = _function(call, here)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = parse(arguments)
            except CalibrationError:
                _bad(f"{here}.function.arguments is not JSON text", "a JSON object")
        if not isinstance(arguments, dict):
            _bad(f"{here}.function.arguments is {_kind(arguments)}", "a JSON object")
        if not isinstance(call.get("id", ""), str):
            _bad(f"{here}.id is {_kind(call['id'])}", "a string")
        yield {**call, "function": {**function, "arguments": arguments}}


def _function(value: object, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        _bad(
            f"{where} has no function name",
            'an object like {"type": "function", "function": {"name": "..."}}',
        )
    return function


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        _bad(f"{where} is {_kind(value)}", "a list")
    return value


def parse(text: str) -> object:
    """The JSON value of a line; the CalibrationError names no line."""
    try:
        value: object = json.loads(text, parse_constant=_no_constant)
        # A lone surrogate is legal JSON ("\ud800") but no tokenizer can encode it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as fault:
        _bad(f"not JSON ({fault.msg} at column {fault.pos + 1})", "one JSON object on the line")
    except RecursionError:
        _bad("the JSON is nested too deeply", "a flat row")
    except UnicodeEncodeError:
        _bad("a string holds half of a surrogate pair", "valid Unicode text")
    except ValueError as fault:
        _bad(f"not usable JSON ({fault})", "one JSON object on the line")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _bad(what: str, expected: str) -> NoReturn:
    raise CalibrationError(f"{what}; expected {expected}")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "missing" if value is None else names.get(type(value), "a number")


def _show(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    return _kind(value)
