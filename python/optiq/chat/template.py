"""A conversation as the tokens that the model's own chat template makes of it.

A template that refuses a conversation, or leaves out its tools, calls, tool results or system
message, is tried again in the forms of forms.py. Which one fits is tested for each conversation
with marked text, because some templates ignore what they do not know without an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import date
from itertools import count
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError

from .forms import FORMS, Chat, Form, Messages, Tools, tools_as_text

# Templates that print today's date get this one, so that the tokens do not change overnight.
# It is the default of the Llama 3.1 template.
FIXED_DATE = date(2024, 7, 26)

# A template is foreign code: each of these only says "not in this form".
REFUSALS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Tokenizer(Protocol):
    """What is needed of mlx-lm's TokenizerWrapper."""

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


class ChatText(NamedTuple):
    """A conversation as text, and the name of the form that the template took, or "plain"."""

    text: str
    form: str


def chat_text(
    messages: Messages, tokenizer: Tokenizer, tools: Tools | None = None, *, answer: bool = False
) -> ChatText:
    """The conversation as the model's template writes it, thinking switched off where it can be.

    Without a template, or one that takes it in no form, turns are named: "User: ...". With `answer`
    the text ends where the model is to answer.
    """
    # Null content becomes "": some templates print "None", others fail on the missing key.
    messages = [{**message, "content": message.get("content", "")} for message in messages]
    chat = (messages, tools or [])
    if tokenizer.has_chat_template:

        def apply(messages: Messages, tools: Tools) -> str | None:
            return _apply_template(tokenizer, messages, tools, answer)

        if fitting := fitting_form(chat, apply):
            return fitting
    return plain_text(chat, answer)


def fitting_form(
    chat: Chat,
    apply: Callable[[Messages, Tools], str | None],
    forms: Mapping[str, Form] = FORMS,
) -> ChatText | None:
    """The conversation in the first form that `apply` takes with nothing left out.

    `apply` is the template; it returns None for what it refuses.
    """
    marked, marks = _mark(*chat)
    for name, form in forms.items():
        probe = apply(*form(*marked))
        if probe is None or not all(mark in probe for mark in marks):
            continue
        text = apply(*form(*chat))
        if text is not None:
            return ChatText(text, name)
    return None


def plain_text(chat: Chat, answer: bool) -> ChatText:
    """The conversation with named turns."""
    turns, _ = tools_as_text(*chat)
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return ChatText("\n\n".join([*lines, "Assistant:"] if answer else lines), "plain")


def encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """The text as token ids, with exactly one BOS in front if the tokenizer has one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return list(tokenizer.encode(text, add_special_tokens=False))
    # Many templates write the BOS themselves, some of them after stray white space.
    if text.lstrip().startswith(tokenizer.bos_token):
        text = text.lstrip()
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    start = next((i for i, token in enumerate(tokens) if token != bos), len(tokens))
    return [bos, *tokens[start:]]


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
    except REFUSALS:
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
