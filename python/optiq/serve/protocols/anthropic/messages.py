"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

from ...answering import End, Happenings, Progress, Step
from ...asked import Wishes
from ...engine.request import Sampling
from ...runs import Ran, Running
from ...tools.python import IDLE_SECONDS
from ...usage import Usage
from ..fields import Fields
from ..problems import Problem
from ..protocol import Service, named_event
from ..signature import sign
from .blocks import Blocks
from .conversation import conversation, read_answer
from .dialect import DIALECT

MAX_STOPS = 64

# As Claude Code asks for it: reasoning of earlier turns stays, as it always does here.
_KEPT = {"type": "clear_thinking_20251015", "keep": "all"}
# Fields that ask for something that is not done here, and the values that ask for nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "container": (),
    "context_management": ({}, {"edits": []}, {"edits": [_KEPT]}),
    "mcp_servers": ([],),
    "speed": ("standard",),
}


async def count_tokens(service: Service, body: Fields, client: str) -> dict[str, Any]:
    service.name(body)
    return {
        "input_tokens": await service.answers.count(
            conversation(body, service.secret, service.answers.python is not None)
        )
    }


async def messages(service: Service, body: Fields, client: str) -> MessageReply:
    body.required("model")
    model = await service.prepared(body)
    for name, harmless in _REFUSED.items():
        if name == "container" and service.answers.python is not None:
            continue
        if name in body and body.values[name] not in harmless:
            raise body.wrong(name, "cannot be honoured by this server")
    wanted = _wishes(body, client, service.model.adapter_of(model))
    asked = conversation(body, service.secret, service.answers.python is not None)
    stream = body.flag("stream")
    thinking = body.object("thinking")
    hidden = thinking is not None and thinking.text("display") == "omitted"
    eager = {
        str(tool.text("name"))
        for tool in body.objects("tools", len(asked.tools))
        if tool.flag("eager_input_streaming")
    }
    return MessageReply(
        stream=stream,
        answering=await service.answers.chat(asked, wanted),
        model=model,
        blocks=Blocks(partial(sign, service.secret, carry=hidden), frozenset(eager), hidden),
        max_tokens=wanted.max_tokens,
        caches=service.caching and _wants_cache(body.values),
        read_back=partial(read_answer, service.secret),
    )


def _wishes(body: Fields, client: str, adapter: str | None) -> Wishes:
    body.required("max_tokens")
    metadata = body.object("metadata")
    user = metadata.text("user_id") if metadata else None
    return Wishes(
        max_tokens=body.integer("max_tokens", 1),
        sampling=Sampling(
            temperature=body.number("temperature", 1.0, 0.0, 1.0),
            top_p=body.number("top_p", 1.0, 0.0, 1.0),
            top_k=body.integer("top_k", 0) or 0,
        ),
        stop=body.texts("stop_sequences", MAX_STOPS),
        client=f"{client}/{user or ''}",
        adapter=adapter,
    )


def _wants_cache(value: object) -> bool:
    """Whether there is a `cache_control` anywhere."""
    if isinstance(value, dict):
        return value.get("cache_control") is not None or any(map(_wants_cache, value.values()))
    return isinstance(value, list) and any(map(_wants_cache, value))


class MessageReply:
    """`caches`: the client has asked for the prompt to be remembered, and is told how much was."""

    def __init__(
        self,
        *,
        stream: bool,
        answering: Happenings,
        model: str,
        blocks: Blocks,
        max_tokens: int | None,
        caches: bool,
        read_back: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    ) -> None:
        self._read_back = read_back
        self._container: str | None = None  # in which programs ran
        self.stream = stream
        self.answering = answering
        self._blocks = blocks
        self._max_tokens = max_tokens
        self._caches = caches
        self._message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }

    async def whole(self) -> dict[str, Any]:
        end: End | None = None
        async for _, event in self.answering:
            if isinstance(event, Running | Ran):
                self._container = event.container
                for _ in self._blocks.program(event):
                    pass
            if isinstance(event, Step | End):
                for part in event.parts:
                    for _ in self._blocks.add(part):
                        pass
            end = event if isinstance(event, End) else end
        for _ in self._blocks.close():
            pass
        assert end is not None
        self._said(end)
        return {
            **self._message,
            "content": self._blocks.content,
            **self._ending(end),
            "usage": self._usage(end.usage),
        }

    async def events(self) -> AsyncIterator[str]:
        started = False
        async for _, event in self.answering:
            if not started:
                started = True
                cached = event.cached if isinstance(event, Progress) else 0
                usage = self._usage(Usage(self.answering.usage.prompt, cached))
                message: dict[str, Any] = {
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                }
                yield named_event(
                    {
                        "type": "message_start",
                        "message": {**self._message, **message, "usage": usage},
                    }
                )
            if isinstance(event, Running | Ran):
                self._container = event.container
                for written in self._blocks.program(event):
                    yield named_event(written)
            if isinstance(event, Step | End):
                for part in event.parts:
                    for written in self._blocks.add(part):
                        yield named_event(written)
            if isinstance(event, End):
                for written in self._blocks.close():
                    yield named_event(written)
                self._said(event)
                delta, usage = self._ending(event), self._usage(event.usage)
                yield named_event({"type": "message_delta", "delta": delta, "usage": usage})
        yield named_event({"type": "message_stop"})

    def _said(self, end: End) -> None:
        if self._blocks.content:  # else it cannot come back
            self.answering.said(0, end, self._read_back(self._blocks.content))

    def error_event(self, problem: Problem, request_id: str) -> str:
        return named_event(DIALECT.error(problem, request_id))

    def _ending(self, end: End) -> dict[str, Any]:
        reasons = {"stop": "end_turn", "stop_text": "stop_sequence", "calls": "tool_use"}
        reason = reasons.get(end.reason, "max_tokens")
        if end.reason == "length" and end.usage.generated < (self._max_tokens or 0):
            reason = "model_context_window_exceeded"
        ending: dict[str, Any] = {"stop_reason": reason, "stop_sequence": end.stop}
        if self._container is not None:
            until = datetime.now(timezone.utc) + timedelta(seconds=IDLE_SECONDS)
            expires = until.strftime("%Y-%m-%dT%H:%M:%SZ")
            ending["container"] = {"id": self._container, "expires_at": expires}
        return ending

    def _usage(self, usage: Usage) -> dict[str, Any]:
        """Tokens read from the cache, those that are new in it, and the rest."""
        kept = max(self.answering.boundaries, default=0) if self._caches else 0
        created = max(kept - usage.cached, 0)
        return {
            "input_tokens": usage.prompt - usage.cached - created,
            "cache_creation_input_tokens": created,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.generated,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
        }
