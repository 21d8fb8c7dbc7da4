"""One calibration row as tokens, the way the model under measurement would see it.

Text rows are encoded as they are. Chat rows go through the model's chat template; a template that
refuses a row, or leaves out its tools, calls, tool results or system message, is tried again in
the forms of `FORMS`, from the most native to the plainest. Which form fits is tested per row with
marked text, because some templates ignore what they do not know without an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import date
from itertools import count
from typing import Any, Protocol

from jinja2 import TemplateError

# Templates that print today's date get this one, so that the tokens do not change overnight.
# It is the default of the Llama 3.1 template.
FIXED_DATE = date(2024, 7, 26)

# A template is foreign code: each of these only says "not in this form".
_REFUSALS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
Chat = tuple[Messages, Tools]


class Tokenizer(Protocol):
    """What render needs of mlx-lm's TokenizerWrapper."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def bos_token(self) -> str: ...
    @property
    def has_chat_template(self) -> bool: ...
    @property
    def chat_template(self) -> Any: ...
    @property
    def encode(self) -> Callable[..., list[int]]: ...
    @property
    def get_chat_template(self) -> Callable[..., str]: ...
    @property
    def apply_chat_template(self) -> Callable[..., Any]: ...


def render(row: dict[str, Any], tokenizer: Tokenizer, *, answer: bool = False) -> list[int]:
    """Token ids of a valid row; exactly one BOS in front if the tokenizer has one.

    With `answer` a chat ends where the model is to answer.
    """
    bos = tokenizer.bos_token_id
    text = row["text"] if "text" in row else chat_text(row, tokenizer, answer=answer)[0]
    if bos is None:
        return list(tokenizer.encode(text, add_special_tokens=False))
    # Many templates write the BOS themselves, some of them after stray white space.
    if text.lstrip().startswith(tokenizer.bos_token):
        text = text.lstrip()
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    start = next((i for i, token in enumerate(tokens) if token != bos), len(tokens))
    return [bos, *tokens[start:]]


def chat_text(
    row: dict[str, Any], tokenizer: Tokenizer, *, answer: bool = False
) -> tuple[str, str]:
    """A chat row as text, and the name of the form that the template took (or "plain")."""
    # Null content becomes "": some templates print "None", others fail on the missing key.
    messages = [{**message, "content": message.get("content", "")} for message in row["messages"]]
    chat = (messages, row.get("tools", []))
    if tokenizer.has_chat_template:
        marked, marks = _mark(*chat)
        for name, form in FORMS.items():
            probe = _apply_template(tokenizer, *form(*marked), answer)
            if probe is None or not all(mark in probe for mark in marks):
                continue
            text = _apply_template(tokenizer, *form(*chat), answer)
            if text is not None:
                return text, name
    turns, _ = _tools_as_text(*chat)
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return "\n\n".join([*lines, "Assistant:"] if answer else lines), "plain"


def _apply_template(
    tokenizer: Tokenizer, messages: Messages, tools: Tools, answer: bool
) -> str | None:
    """The rendered conversation, or None if the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=answer,
                enable_thinking=False,
                **_fixed_date(tokenizer, tools),
            )
        )
    except _REFUSALS:
        return None


def _fixed_date(tokenizer: Tokenizer, tools: Tools) -> dict[str, str]:
    """Template arguments that pin the date, for a template that takes or asks for it."""
    if tokenizer.chat_template is None:
        return {}
    source = tokenizer.get_chat_template(tools=tools or None)
    pinned = {}
    if "date_string" in source:
        pinned["date_string"] = FIXED_DATE.strftime("%d %b %Y")
    # strftime_now is a function that transformers gives to templates and nobody can override.
    fixed = re.sub(
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
        lambda call: json.dumps(FIXED_DATE.strftime(call[2])),
        source,
    )
    if fixed != source:
        pinned["chat_template"] = fixed
    return pinned


def _mark(messages: Messages, tools: Tools) -> tuple[Chat, list[str]]:
    """The conversation with unique words in each part a template may drop, and those words."""
    marks: list[str] = []
    numbers = count()

    def mark() -> str:
        marks.append(f"zqmark{next(numbers)}x")
        return marks[-1]

    marked_tools = [{**t, "function": {**t["function"], "name": mark()}} for t in tools]
    names = {
        tool["function"]["name"]: other["function"]["name"]
        for tool, other in zip(tools, marked_tools, strict=True)
    }
    marked = []
    for message in messages:
        message = dict(message)
        if message["role"] in ("system", "tool"):
            message["content"] += mark()
        if "tool_calls" in message:
            message["tool_calls"] = [
                {
                    **call,
                    "function": {
                        "name": names.get(call["function"]["name"]) or mark(),
                        "arguments": {mark(): mark()},
                    },
                }
                for call in message["tool_calls"]
            ]
        marked.append(message)
    return (marked, marked_tools), marks


def _native(messages: Messages, tools: Tools) -> Chat:
    return messages, tools


def _json_arguments(messages: Messages, tools: Tools) -> Chat:
    """Call arguments as JSON text (DeepSeek concatenates them; dicts are what Qwen wants)."""
    return _map_calls(messages, lambda call: {"arguments": _json(call["arguments"])}), tools


def _nine_character_ids(messages: Messages, tools: Tools) -> Chat:
    """Call ids as nine alphanumeric characters, the only ones that Mistral templates accept."""
    ids: dict[str, str] = {}
    renamed = []
    for message in messages:
        message = dict(message)
        if "tool_calls" in message:
            message["tool_calls"] = [
                {**call, "id": ids.setdefault(call.get("id", ""), f"call{len(ids):05}")}
                for call in message["tool_calls"]
            ]
        if "tool_call_id" in message:
            message["tool_call_id"] = ids[message["tool_call_id"]]
        renamed.append(message)
    return renamed, tools


def _tools_as_text(messages: Messages, tools: Tools) -> Chat:
    """Tools as JSON in the system message, calls in the assistant's text, results as user turns."""
    written = []
    for message in messages:
        role, parts = message["role"], [message["content"]]
        if role == "tool":
            role, parts = "user", [f"<tool_response>\n{message['content']}\n</tool_response>"]
        for call in message.get("tool_calls", []):
            body = {key: call["function"][key] for key in ("name", "arguments")}
            parts.append(f"<tool_call>\n{_json(body)}\n</tool_call>")
        written.append({"role": role, "content": "\n".join(part for part in parts if part)})
    if tools:
        listing = "\n".join(_json(tool) for tool in tools)
        note = f"Tools:\n<tools>\n{listing}\n</tools>\nTo use one, answer " + (
            '<tool_call>{"name": ..., "arguments": ...}</tool_call>.'
        )
        if written[0]["role"] == "system":
            note = f"{written.pop(0)['content']}\n\n{note}"
        written.insert(0, {"role": "system", "content": note})
    return list(_joined(written)), []


def _merged_system(messages: Messages, tools: Tools) -> Chat:
    """As _tools_as_text, with every system message at the head of a user turn (Gemma)."""
    written, _ = _tools_as_text(messages, tools)
    for message in written:
        if message["role"] == "system":
            message["role"] = "user"
    return list(_joined(written)), []


# The forms a chat is offered in, in this order.
FORMS: dict[str, Callable[[Messages, Tools], Chat]] = {
    "native": _native,
    "json arguments": _json_arguments,
    "nine-character ids": _nine_character_ids,
    "tools as text": _tools_as_text,
    "merged system": _merged_system,
}


def _joined(messages: Messages) -> Iterator[dict[str, Any]]:
    """Neighbouring turns of one role as one turn: templates that alternate refuse two."""
    last: dict[str, Any] | None = None
    for message in messages:
        if last is not None and last["role"] == message["role"]:
            last["content"] += "\n\n" + message["content"]
            continue
        if last is not None:
            yield last
        last = dict(message)
    if last is not None:
        yield last


def _map_calls(messages: Messages, change: Callable[[Any], dict[str, Any]]) -> Messages:
    return [
        {
            **message,
            "tool_calls": [
                {**call, "function": {**call["function"], **change(call["function"])}}
                for call in message["tool_calls"]
            ],
        }
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
