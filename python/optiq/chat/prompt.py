"""A conversation as the prompt of one answer: its tokens, and where its messages end.

The template is the model's own, in the first form that it takes (forms.py). What a template refuses
in every form is a `ChatError` with the template's reason.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import ChatError
from .any_of import any_of
from .controls import Controls
from .forms import FORMS, KIMI_FORMS, Chat, Messages, Tools
from .notation import native_notation
from .template import REFUSALS, fitting_form, plain_text
from .time_limit import LIMIT, within

ROLES = ("system", "developer", "user", "assistant", "tool")
_SYSTEM = ("system", "developer")
# How many ends of messages are looked for: that of the system message, and the last ones.
MOST_BOUNDARIES = 8

_WORD = re.compile(r"\w+")

# What apply_chat_template takes besides the variables of a template.
_RESERVED = {
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
}


@dataclass(frozen=True)
class Prompt:
    """`boundaries` are lengths of `tokens` at which a message ends. `reasoning` says that the
    answer begins inside reasoning."""

    tokens: tuple[int, ...]
    boundaries: tuple[int, ...]
    reasoning: bool


@dataclass(frozen=True)
class Replay:
    """The tokens by which a model has said message `index`, and all before it.

    A template may write an answer otherwise than the model did: without its reasoning, with other
    white space. With these tokens the prompt goes on from what the model has read.
    """

    index: int
    tokens: tuple[int, ...]


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    thinking: bool | None = None,
    arguments: Mapping[str, Any] | None = None,
    replay: Replay | None = None,
    continues: bool = False,
) -> Prompt:
    """The prompt that asks for an answer to `messages`. `replay` is used where it can be.

    Messages and tools have OpenAI's shape; an assistant's may have "reasoning_content". `thinking`
    switches reasoning on or off where the template can; with None it is as mlx-lm has it, which
    tells the template to reason if the model can. `arguments` are variables for the template. With
    `continues` the last message is the beginning of the answer, which goes on right after it.
    """
    if not messages:
        raise ChatError("the conversation has no messages; send at least one")
    for name in arguments or {}:
        if name in _RESERVED or name.endswith("_token"):
            raise ChatError(f"{name!r} cannot be set for a chat template; leave it out")
    template = _Template(tokenizer, thinking, arguments or {})
    plain = [_message(message, template.source) for message in messages]
    chat = template.marked(plain, [dict(tool) for tool in tools or []])
    if not tokenizer.has_chat_template:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        tokens = bos + template.controls.encode(plain_text(chat, answer=not continues).text)
        return Prompt(tuple(tokens), (), False)
    return template.prompt(*chat, replay, continues)


class _Template:
    """The template of a model, with the variables of one request."""

    def __init__(self, tokenizer: Any, thinking: bool | None, arguments: Mapping[str, Any]) -> None:
        self.source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self._forms = KIMI_FORMS if "<|tool_call_argument_begin|>" in self.source else FORMS
        known = native_notation(tokenizer)
        self._span = known.reasoning
        self._always_reasons = known.channels is not None
        span = (self._span.start, self._span.end) if self._span else ()
        self.controls = Controls(tokenizer, self.source, span)
        ends = known.channels.ends if known.channels else ()
        self._closes = any_of([*self.controls.texts(tokenizer.eos_token_ids), *ends])
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._variables: dict[str, Any] = {}
        if thinking is not None:
            self._variables["enable_thinking"] = thinking
            if "thinking" in self.source.replace("enable_thinking", ""):  # DeepSeek, Granite
                self._variables["thinking"] = thinking
        self._variables |= self.controls.mark(dict(arguments))
        self._refused = ""  # why, the first time
        self._begun: tuple[str, str] | None = None  # the answer's beginning, after its stub

    def marked(self, messages: Messages, tools: Tools) -> Chat:
        """The conversation with marks at its control tokens. Reasoning that a client has left in
        the text of an answer is for the template to cut off."""
        span = (self._span.start, self._span.end) if self._span else ()
        marked: Messages = self.controls.mark(messages)
        for message, plain in zip(marked, messages, strict=True):
            if plain["role"] == "assistant":
                message["content"] = self.controls.mark(plain["content"], but=span)
        return marked, self.controls.mark(tools)

    def prompt(
        self, messages: Messages, tools: Tools, replay: Replay | None, continues: bool
    ) -> Prompt:
        if continues:
            *before, last = messages
            self._begun = stub, _ = _stub(), last["content"]
            messages = [*before, {**last, "content": stub}]
        try:
            if replay is not None:
                stub = _stub()
                stubbed = _with_stub(messages, replay.index, stub)
                written = within(LIMIT, lambda: self._written(stubbed, tools))
                if written is not None and (cut := self._end_of(stub, written[0], stubbed)):
                    return self._prompt(*written, cut, replay.tokens)
            written = within(LIMIT, lambda: self._written(messages, tools))
        except TimeoutError:
            raise ChatError(f"the chat template takes more than {LIMIT:.0f} seconds") from None
        if written is None:
            reason = self._refused or "it leaves out part of it"
            raise ChatError(f"the chat template refuses the conversation: {reason}")
        return self._prompt(*written)

    def _written(self, messages: Messages, tools: Tools) -> tuple[str, list[int]] | None:
        """The text of the conversation, and where messages end in it."""
        chat = fitting_form(
            (messages, tools),
            lambda messages, tools: self._apply(messages, tools, answer=self._begun is None),
            self._forms,
        )
        if chat is None:
            return None
        form, text = self._forms[chat.form], chat.text
        if self._begun is not None:  # without what closes the turn, and whatever may be trimmed
            stub, begun = self._begun
            if stub not in text:
                return None
            text = text[: text.rindex(stub)] + begun
        ends = []
        for count in _counts(messages):
            prefix = self._apply(*form(messages[:count], tools), answer=False)
            if prefix and text.startswith(prefix) and len(prefix) < len(text):
                ends.append(len(prefix))
        return text, ends

    def _prompt(
        self, text: str, ends: Sequence[int], cut: int = 0, before: tuple[int, ...] = ()
    ) -> Prompt:
        """`before` are the tokens of the text up to `cut`."""
        begin = self.controls.plain(text[ends[-1] :] if ends else text)
        text, ends = text[cut:], [end - cut for end in ends if end > cut]
        tokens = self.controls.encode(text)
        lengths = (len(before) + n for n in self._lengths(text, ends, tokens))
        return Prompt((*before, *tokens), tuple(lengths), self._reasons(begin))

    def _end_of(self, stub: str, text: str, messages: Messages) -> int | None:
        """Where the turn with the stub is closed, before the next message begins; None where the
        text does not say."""
        found = text.rfind(stub)
        begin = found + len(stub)  # its digits may be the next message's first word
        index = next(i for i, m in enumerate(messages) if m["content"] == stub)
        following = _WORD.search(messages[index + 1]["content"]) if messages[index + 1 :] else None
        if found < 0 or following is None:
            return None
        closed = self._closes.search(text, begin)
        if closed is None or not closed.start() < text.find(following[0], begin):
            return None
        return closed.start()

    def _apply(self, messages: Messages, tools: Tools, answer: bool) -> str | None:
        """The text of the conversation; None if the template refuses it."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools or None,
                    tokenize=False,
                    add_generation_prompt=answer,
                    **self._variables,
                )
            )
        except (*REFUSALS, MemoryError) as error:
            if not self._refused:
                self._refused = str(error) or type(error).__name__
            return None

    def _lengths(self, text: str, ends: Sequence[int], tokens: Sequence[int]) -> Iterator[int]:
        """In tokens, the lengths `ends` of the text; without those within a token."""
        begin = length = 0
        for end in ends:
            part = self.controls.encode(text[begin:end])
            if list(tokens[length : length + len(part)]) == part:
                begin, length = end, length + len(part)
                yield length

    def _reasons(self, begin: str) -> bool:
        """Whether `begin`, what the template writes for the answer, opens reasoning."""
        span = self._span
        open = span is not None and begin.rfind(span.start) > begin.rfind(span.end)
        always = self._always_reasons and self._begun is None
        if (open or always) and self._thinking is False:
            raise ChatError("this model always reasons: its chat template cannot switch it off")
        return open


def _stub() -> str:
    """A word that nobody can have written."""
    return f"stub{secrets.token_hex(8)}"


def _with_stub(messages: Messages, index: int, stub: str) -> Messages:
    """The messages with a stub in the place of what one of them says and calls last."""
    message = {**messages[index], "content": stub}
    for key in ("reasoning_content", "reasoning", "thinking"):
        message.pop(key, None)
    if calls := message.get("tool_calls"):
        last = {**calls[-1], "function": {**calls[-1]["function"], "arguments": {stub: stub}}}
        message["tool_calls"] = [*calls[:-1], last]
    return [*messages[:index], message, *messages[index + 1 :]]


def _counts(messages: Messages) -> Iterator[int]:
    """How many messages the prefixes have whose ends are looked for."""
    head = next((i for i, m in enumerate(messages) if m["role"] not in _SYSTEM), len(messages))
    last = range(max(1, len(messages) - MOST_BOUNDARIES + 2), len(messages) + 1)
    if head and head not in last:
        yield head
    yield from last


def _message(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A message as templates expect it: text as one string, arguments of calls as objects."""
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"a message has the role {role!r}; the roles are {', '.join(ROLES)}")
    written = {**message, "content": _content(message.get("content"))}
    if role == "developer" and "developer" not in template:
        written["role"] = "system"
    if calls := message.get("tool_calls"):
        written["tool_calls"] = [_call(call) for call in calls]
    else:
        written.pop("tool_calls", None)
    if reasoning := message.get("reasoning_content"):
        # What templates call it; gpt-oss's refuses it beside the content of a call.
        for key in ("reasoning", "thinking"):
            if f".{key}" in template and not (calls and written["content"]):
                written[key] = reasoning
    else:
        written.pop("reasoning_content", None)
    return written


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.get("type") != "text":
            raise ChatError(
                f"a message has a part of type {part.get('type')!r}; this model reads text only"
            )
        texts.append(part["text"])
    return "".join(texts)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object; text that is not one stays as the model wrote it."""
    function = dict(call["function"])
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}
