"""/v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ....chat.parts import CallArguments, CallEnd, CallStart, Part, Reasoning, Text
from ...answering import End, Happenings, Step
from ...engine.request import MAX_TOP_LOGPROBS, Token
from ...runs import Ran, Running
from ...tokens import TokenBytes
from ...usage import Usage
from ..fields import Fields
from ..interpreter import pictures, written_files
from ..problems import Problem
from ..protocol import Service
from .conversation import conversation, read_turns
from .dialect import DIALECT, DONE, data
from .logprobs import chat_logprobs
from .wishes import wants_usage, wishes

FINISH = {"stop": "stop", "stop_text": "stop", "length": "length", "calls": "tool_calls"}


async def chat(service: Service, body: Fields, client: str) -> ChatReply:
    model = await service.prepared(body)
    top = _top_logprobs(body)
    asked = conversation(body, service.answers.python is not None)
    wanted = wishes(body, client, service.model.adapter_of(model), top_logprobs=top)
    stream, usage = body.flag("stream"), wants_usage(body)
    return ChatReply(
        stream=stream,
        answering=await service.answers.chat(asked, wanted),
        model=model,
        fingerprint=service.fingerprint(model),
        names=service.answers.language.tokens if top is not None else None,
        include_usage=usage,
    )


def _top_logprobs(body: Fields) -> int | None:
    wanted, top = body.flag("logprobs"), body.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise body.wrong("top_logprobs", "needs 'logprobs' to be true")
    return (top or 0) if wanted else None


@dataclass
class _Message:
    """A choice of a response that is not streamed."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    complete: set[int] = field(default_factory=set)
    tokens: list[Token] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)  # programs that the server has run
    finish: str = ""

    def program(self, event: Running | Ran) -> dict[str, Any]:
        """A program begins, or has ended; returns what is new of it."""
        new: dict[str, Any]
        if isinstance(event, Running):
            new = {
                "id": event.id,
                "container_id": event.container,
                "code": event.code,
                "content_offset": len(self.content),
                "reasoning_offset": len(self.reasoning),
                "status": "interpreting",
            }
            self.runs.append({})
        else:
            logs = {"type": "logs", "logs": event.text}
            images = [{"type": "image", "url": url} for url in pictures(event)]
            new = {
                "status": "failed" if event.failed else "completed",
                "outputs": [logs, *images],
                "files": written_files(event),
            }
        self.runs[-1] |= new
        return {"index": len(self.runs) - 1, **new}

    def add(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, Text):
                self.content += part.text
            elif isinstance(part, Reasoning):
                self.reasoning += part.text
            elif isinstance(part, CallStart):
                self.calls[part.index] = _call(part.name)
            elif isinstance(part, CallArguments):
                self.calls[part.index]["function"]["arguments"] += part.text
            else:
                self.complete.add(part.index)

    def message(self) -> dict[str, Any]:
        # A call that was never complete has been repeated as text.
        calls = [self.calls[index] for index in sorted(self.complete)]
        return {
            "role": "assistant",
            "content": self.content if self.content or not calls else None,
            "refusal": None,
            **({"reasoning_content": self.reasoning} if self.reasoning else {}),
            **({"tool_calls": calls} if calls else {}),
            **({"code_interpreter_calls": self.runs} if self.runs else {}),
        }


def _call(name: str) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": ""},
    }


class ChatReply:
    """`names` are the texts of tokens where log-probabilities were asked for."""

    def __init__(
        self,
        *,
        stream: bool,
        answering: Happenings,
        model: str,
        fingerprint: str,
        names: TokenBytes | None,
        include_usage: bool,
    ) -> None:
        self.stream = stream
        self.answering = answering
        self._names = names
        self._include_usage = include_usage
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        messages = [_Message() for _ in range(self.answering.n)]
        async for choice, event in self.answering:
            message = messages[choice]
            if isinstance(event, Step | End):
                message.add(event.parts)
            if isinstance(event, Running | Ran):
                message.program(event)
            if isinstance(event, Step):
                message.tokens.extend(event.tokens)
            elif isinstance(event, End):
                message.finish = FINISH[event.reason]
                self._said(choice, event, message)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": message.message(),
                    "logprobs": self._logprobs(message.tokens),
                    "finish_reason": message.finish,
                }
                for index, message in enumerate(messages)
            ],
            "usage": usage(self.answering.usage),
        }

    async def events(self) -> AsyncIterator[str]:
        for choice in range(self.answering.n):
            yield self._chunk(choice, {"role": "assistant", "content": "", "refusal": None})
        messages = [_Message() for _ in range(self.answering.n)]
        async for choice, event in self.answering:
            tokens = event.tokens if isinstance(event, Step) else ()
            if isinstance(event, Running | Ran):
                run = messages[choice].program(event)
                yield self._chunk(choice, {"code_interpreter_calls": [run]})
            if isinstance(event, Step | End):
                messages[choice].add(event.parts)
                for delta in _deltas(event.parts):
                    yield self._chunk(choice, delta, tokens)
                    tokens = ()
            if tokens and self._names is not None:  # of text that is held back
                yield self._chunk(choice, {}, tokens)
            if isinstance(event, End):
                self._said(choice, event, messages[choice])
                yield self._chunk(choice, {}, finish=FINISH[event.reason])
        if self._include_usage:
            yield data(self._body([], usage(self.answering.usage)))
        yield DONE

    def _said(self, choice: int, end: End, message: _Message) -> None:
        if message.content or message.complete:  # else it cannot come back
            self.answering.said(choice, end, read_turns(Fields(message.message()), {})[-1])

    def error_event(self, problem: Problem, request_id: str) -> str:
        return DIALECT.error_event(problem, request_id)

    def _chunk(
        self,
        choice: int,
        delta: Mapping[str, Any],
        tokens: Sequence[Token] = (),
        finish: str | None = None,
    ) -> str:
        written = {
            "index": choice,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish,
        }
        return data(self._body([written], None))

    def _body(self, choices: list[Any], counts: dict[str, Any] | None) -> dict[str, Any]:
        body = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return {**body, "usage": counts} if self._include_usage else body

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._names is None:
            return None
        return {"content": chat_logprobs(tokens, self._names), "refusal": None}


def _deltas(parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
    for part in parts:
        if isinstance(part, Text):
            yield {"content": part.text}
        elif isinstance(part, Reasoning):
            yield {"reasoning_content": part.text}
        elif isinstance(part, CallStart):
            yield {"tool_calls": [{"index": part.index, **_call(part.name)}]}
        elif isinstance(part, CallArguments):
            call = {"index": part.index, "function": {"arguments": part.text}}
            yield {"tool_calls": [call]}
        else:
            assert isinstance(part, CallEnd)


def usage(counts: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.generated,
        "total_tokens": counts.prompt + counts.generated,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning},
    }
