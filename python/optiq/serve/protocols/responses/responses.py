"""/v1/responses and /v1/responses/input_tokens."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....chat.parts import Text
from ...answering import End, Happenings, Step
from ...asked import Chat, Form, Thinking, Wishes
from ...engine.request import MAX_TOP_LOGPROBS, Token
from ...runs import Ran, Running
from ...tokens import TokenBytes
from ...usage import Usage
from ..fields import Fields
from ..interpreter import MAX_CALLS
from ..openai.conversation import EFFORTS
from ..openai.logprobs import chat_logprobs
from ..openai.wishes import sampling
from ..problems import Problem
from ..protocol import Service, named_event
from ..signature import sign
from ..store import Item
from .items import Messages, given_items, read_answer
from .output import Event, Output
from .tools import Offer, offer

MAX_INCLUDED = 32
SEALED = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"

# Fields that ask for something that is not done here, and the values that ask for nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "prompt": (),
    "truncation": ("disabled",),
}


@dataclass(frozen=True)
class _Asked:
    """What a request asks; `items` is the whole conversation, with what was stored of it."""

    chat: Chat
    offer: Offer
    items: Sequence[Item]
    notes: tuple[str, ...]


async def count_input(service: Service, body: Fields, client: str) -> dict[str, Any]:
    service.name(body)
    tokens = await service.answers.count(_read(service, body).chat)
    return {"object": "response.input_tokens", "input_tokens": tokens}


async def respond(service: Service, body: Fields, client: str) -> ResponseReply:
    model = await service.prepared(body)
    for name, harmless in _REFUSED.items():
        if name in body and body.values[name] not in harmless:
            raise body.wrong(name, "cannot be honoured by this server")
    asked = _read(service, body)
    included = body.texts("include", MAX_INCLUDED)
    top = body.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is None and LOGPROBS in included:
        top = 0
    store = body.flag("store", True)
    wanted = Wishes(
        max_tokens=body.integer("max_output_tokens", 1),
        sampling=sampling(body),
        top_logprobs=top,
        client=f"{client}/{body.text('user') or body.text('safety_identifier') or ''}",
        adapter=service.model.adapter_of(model),
    )
    stream = body.flag("stream")
    head = _head(body, asked, wanted, model)
    return ResponseReply(
        stream=stream,
        answering=await service.answers.chat(asked.chat, wanted),
        head=head,
        output=Output(
            asked.offer.called,
            partial(sign, service.secret, carry=True) if SEALED in included else None,
        ),
        names=service.answers.language.tokens if top is not None else None,
        keep=partial(service.store.keep, before=asked.items) if store else None,
        read_back=partial(read_answer, service.secret),
    )


def _read(service: Service, body: Fields) -> _Asked:
    before: Sequence[Item] = ()
    if "previous_response_id" in body:
        before = service.store.find(body.text("previous_response_id") or "", 400).items
    items = [*before, *given_items(body, service.store)]
    read = Messages(service.secret)
    instructions = body.text("instructions")
    if instructions:
        read.messages.append({"role": "system", "content": instructions})
    read.read(items, len(before))
    if not read.messages or read.messages[-1]["role"] == "assistant":
        raise body.wrong("input", "must end with a turn of the user's, or with a tool's output")
    tools = offer(body, service.answers.python is not None, read.containers)
    chat = Chat(
        messages=tuple(read.messages),
        tools=tools.tools,
        tool_choice=tools.choice,
        parallel=body.flag("parallel_tool_calls", True),
        form=_form(body),
        thinking=_thinking(body),
        interpreter=tools.interpreter,
    )
    notes = [f"the tool {kind!r} is not offered by this server" for kind in tools.skipped]
    notes += [f"the item {kind!r} means nothing to this server" for kind in read.skipped]
    return _Asked(chat, tools, items, tuple(dict.fromkeys(notes)))


def _form(body: Fields) -> Form:
    text = body.object("text")
    if text is None:
        return Form()
    if text.text("verbosity", "medium") != "medium":
        raise text.wrong("verbosity", "cannot be honoured by this server; leave it out")
    form = text.object("format")
    if form is None:
        return Form()
    sort = form.one_of("type", ("text", "json_object", "json_schema"), "text")
    if sort == "json_schema":
        form.required("name")
        form.required("schema")
        schema = form.object("schema")
        return Form("json_schema", dict(schema.values) if schema else {})
    return Form("json_object" if sort == "json_object" else "text")


def _thinking(body: Fields) -> Thinking:
    reasoning = body.object("reasoning")
    if reasoning is None or "effort" not in reasoning:
        return Thinking()
    effort = reasoning.one_of("effort", EFFORTS, "")
    return Thinking(False) if effort == "none" else Thinking(True, effort)


def _head(body: Fields, asked: _Asked, wanted: Wishes, model: str) -> dict[str, Any]:
    """What a response says of its request. `notes` is ours: what was left out of the request."""
    values, text = body.values, body.object("text")
    reasoning = body.object("reasoning")
    metadata = body.object("metadata")
    told = reasoning.values if reasoning else {}
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "background": False,
        "frequency_penalty": wanted.sampling.frequency_penalty,
        "instructions": body.text("instructions"),
        "max_output_tokens": wanted.max_tokens,
        "max_tool_calls": body.integer("max_tool_calls", 1, MAX_CALLS),
        "metadata": dict(metadata.values) if metadata else {},
        "parallel_tool_calls": asked.chat.parallel,
        "presence_penalty": wanted.sampling.presence_penalty,
        "previous_response_id": body.text("previous_response_id"),
        "prompt_cache_key": body.text("prompt_cache_key"),
        "reasoning": {"effort": told.get("effort"), "summary": told.get("summary")},
        "safety_identifier": body.text("safety_identifier"),
        "service_tier": "default",
        "store": body.flag("store", True),
        "temperature": wanted.sampling.temperature,
        "text": {"format": (text and text.values.get("format")) or {"type": "text"}},
        "tool_choice": values.get("tool_choice") or "auto",
        "tools": list(asked.offer.shown),
        "top_logprobs": wanted.top_logprobs or 0,
        "top_p": wanted.sampling.top_p,
        "truncation": "disabled",
        **({"user": body.text("user")} if "user" in body else {}),
        **({"notes": list(asked.notes)} if asked.notes else {}),
    }


class ResponseReply:
    """`keep` remembers the response when it is complete. `names` are the texts of tokens where
    log-probabilities were asked for."""

    def __init__(
        self,
        *,
        stream: bool,
        answering: Happenings,
        head: Mapping[str, Any],
        output: Output,
        names: TokenBytes | None,
        keep: Callable[[Mapping[str, Any]], None] | None,
        read_back: Callable[[Sequence[Item]], Mapping[str, Any]],
    ) -> None:
        self._read_back = read_back
        self.stream, self.answering = stream, answering
        self._head, self._output = head, output
        self._names, self._keep = names, keep
        self._tokens: list[Token] = []  # of text that has not come yet
        self._number = 0

    async def whole(self) -> dict[str, Any]:
        async for event in self._happening():
            if event["type"] in ("response.completed", "response.incomplete"):
                response: dict[str, Any] = event["response"]
        return response

    async def events(self) -> AsyncIterator[str]:
        async for event in self._happening():
            yield self._written(event)

    def error_event(self, problem: Problem, request_id: str) -> str:
        error = {"code": "server_error", "message": problem.message}
        deque(self._output.close("incomplete"), maxlen=0)
        response = self._response("failed", error=error)
        return self._written({"type": "response.failed", "response": response})

    def _written(self, event: Event) -> str:
        event["sequence_number"] = self._number
        self._number += 1
        return named_event(event)

    async def _happening(self) -> AsyncIterator[Event]:
        for status in ("created", "in_progress"):
            yield {"type": f"response.{status}", "response": self._response("in_progress")}
        async for _, event in self.answering:
            if isinstance(event, Step):
                self._tokens.extend(event.tokens)
            if isinstance(event, Step | End):
                for part in event.parts:
                    for written in self._output.add(part, self._logprobs(part)):
                        yield written
            if isinstance(event, Running | Ran):
                for written in self._output.program(event):
                    yield written
            if isinstance(event, End):
                for written in self._end(event):
                    yield written

    def _end(self, end: End) -> list[Event]:
        cut = end.reason == "length"
        status = "incomplete" if cut else "completed"
        events = list(self._output.close(status))
        details = {"reason": "max_output_tokens"} if cut else None
        response = self._response(status, incomplete_details=details, usage=_usage(end.usage))
        if self._output.items:  # else it cannot come back
            self.answering.said(0, end, self._read_back(self._output.items))
        if self._keep is not None:
            self._keep(response)
        return [*events, {"type": f"response.{status}", "response": response}]

    def _logprobs(self, part: Any) -> list[dict[str, Any]]:
        tokens, self._tokens = self._tokens, []
        if self._names is None or not isinstance(part, Text):
            return []
        return chat_logprobs(tokens, self._names)

    def _response(
        self,
        status: str,
        *,
        error: Mapping[str, Any] | None = None,
        incomplete_details: Mapping[str, Any] | None = None,
        usage: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": incomplete_details,
            "output": list(self._output.items) if status != "in_progress" else [],
            "usage": usage,
        }


def _usage(counts: Usage) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.generated,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.generated,
    }
