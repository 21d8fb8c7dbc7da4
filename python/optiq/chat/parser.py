"""Tool calls in the notations that models are trained to write.

An envelope decides, if there is one: Hermes and Qwen `<tool_call>`, Mistral `[TOOL_CALLS]`, Llama
`<|python_tag|>` and `<function=name>`, code fences as Gemma writes them. Inside it, and in an
answer without any, a call is JSON ({"name": ..., "arguments": ...} and its variants) or Python
syntax. Of prose around a call without an envelope only the JSON is found: words can look like
Python, they rarely look like a JSON call.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from .calls import Call, ParseError, Unreadable
from .python_syntax import python_calls

_END_OF_TURN = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|eot|eom|end|end_of_text|endoftext)\|>|</s>|<end_of_turn>|<eos>"
)
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([\w.-]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_MISTRAL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)
_FENCE = re.compile(r"```(\w*)\s(.*?)(?:```|\Z)", re.DOTALL)
_LANGUAGES = {"", "json", "python", "py", "tool_code", "tool_call"}
_BETWEEN = re.compile(r"[\s,;]*")
_JSON = json.JSONDecoder()


def parse(answer: str) -> list[Call] | ParseError:
    """The calls in a model's answer, in order, or why it has none that can be read.

    `answer` is the generated text, with or without special tokens and a closed <think> block.
    Never raises on any text.
    """
    text = answer.rpartition("</think>")[2]
    if "<think>" in text:
        return ParseError("the thought never ends")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in what the model wrote
            return _read(_END_OF_TURN.split(text, maxsplit=1)[0].strip())
    except Unreadable as error:
        return ParseError(str(error))
    except (RecursionError, MemoryError):
        return ParseError("nested too deeply")


def _read(text: str) -> list[Call]:
    if not text:
        raise Unreadable("the answer is empty")
    if "<tool_call>" in text:
        return _each(_TOOL_CALL.findall(text), _plain)
    if "[TOOL_CALLS]" in text:
        return _each(text.split("[TOOL_CALLS]")[1:], _mistral)
    if "<|python_tag|>" in text:
        return _plain(text.partition("<|python_tag|>")[2])
    if named := _FUNCTION.findall(text):
        return [Call(name, _arguments(body)) for name, body in named]
    fenced = [body for language, body in _FENCE.findall(text) if language.lower() in _LANGUAGES]
    if fenced:
        with suppress(Unreadable):
            return _each(fenced, _plain)
    try:
        return _plain(text)
    except Unreadable:
        if calls := _in_prose(text):
            return calls
        raise


def _each(parts: Sequence[str], read: Callable[[str], list[Call]]) -> list[Call]:
    """The calls of all parts; a broken one beside a whole one is passed over."""
    calls: list[Call] = []
    error = None
    for part in parts:
        try:
            calls += read(part)
        except Unreadable as unreadable:
            error = unreadable
    if error and not calls:
        raise error
    return calls


def _plain(text: str) -> list[Call]:
    """A text that is nothing but calls."""
    text = text.strip("` \t\r\n")
    try:
        values = _values(text)
    except (ValueError, SyntaxError, TypeError):
        return python_calls(text)
    return [call for value in values for call in json_calls(value)]


def _mistral(text: str) -> list[Call]:
    if match := _MISTRAL.fullmatch(text):
        return [Call(match[1], _arguments(match[2]))]
    return _plain(text)


def _in_prose(text: str) -> list[Call]:
    calls, at = [], 0
    while at < len(text):
        start, at = at, at + 1
        if text[start] in "{[":
            with suppress(ValueError, Unreadable):
                value, end = _JSON.raw_decode(text, start)
                calls += json_calls(value)
                at = end
    return calls


def _values(text: str) -> list[Any]:
    """JSON, or the Python that Llama at times writes in its place: single quotes, True, None."""
    try:
        return _json_values(text)
    except ValueError:  # also for integers of more digits than Python reads
        if not text.startswith(("{", "[{")):
            raise
        return [ast.literal_eval(text)]


def _json_values(text: str) -> list[Any]:
    """One JSON value or several, separated by nothing, commas or semicolons."""
    values, at = [], 0
    while at < len(text):
        value, at = _JSON.raw_decode(text, at)
        values.append(value)
        between = _BETWEEN.match(text, at)
        assert between
        at = between.end()
    return values


def json_calls(value: Any) -> list[Call]:
    """The calls that a JSON value holds, in any of the shapes that servers use, or Unreadable."""
    if isinstance(value, list):
        return [call for item in value for call in json_calls(item)]
    if not isinstance(value, dict):
        raise Unreadable("the JSON is not a call")
    if isinstance(value.get("tool_calls"), list):
        return json_calls(value["tool_calls"])
    if isinstance(value.get("function"), dict):  # OpenAI: {"type": "function", "function": {...}}
        return json_calls(value["function"])
    name = value.get("name", value.get("function"))
    for key in ("arguments", "parameters"):
        if isinstance(name, str) and key in value:
            return [Call(name, _arguments(value[key]))]
    if len(value) == 1:  # {"name of the function": {...}}
        ((name, arguments),) = value.items()
        if isinstance(name, str) and isinstance(arguments, dict):
            return [Call(name, arguments)]
    raise Unreadable("the JSON has no name and arguments of a call")


def _arguments(value: Any) -> dict[str, Any]:
    """An object, or the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except ValueError as error:
            raise Unreadable(f"the arguments are not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Unreadable("the arguments are not an object")
    return value
