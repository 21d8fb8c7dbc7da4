"""/v1/completions: texts or tokens go on as they are."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...answering import Answering, End, Step
from ...answers import MAX_ANSWERS
from ...engine.request import MAX_TOP_LOGPROBS, Token
from ...language import Language
from ..fields import Fields
from ..problems import Problem
from ..protocol import Service
from .chat import FINISH, usage
from .dialect import DIALECT, DONE, data
from .logprobs import completion_logprobs
from .wishes import MAX_CHOICES, wants_usage, wishes

Prompt = str | tuple[int, ...]


async def complete(service: Service, body: Fields, client: str) -> CompletionReply:
    model = await service.prepared(body)
    logprobs = body.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    wanted = wishes(body, client, service.model.adapter_of(model), top_logprobs=logprobs)
    prompts, echo, stream = _prompts(body), body.flag("echo"), body.flag("stream")
    best_of = body.integer("best_of", 1, MAX_CHOICES) or wanted.n
    if "suffix" in body and body.text("suffix"):
        raise body.wrong("suffix", "cannot be honoured by this server; put it into the prompt")
    if echo and logprobs is not None:
        raise body.wrong("echo", "cannot be combined with 'logprobs': prompts are not scored")
    if best_of < wanted.n:
        raise body.wrong("best_of", f"is {best_of}, less than 'n', which is {wanted.n}")
    if best_of > wanted.n and stream:
        raise body.wrong("best_of", "cannot be more than 'n' in a stream")
    include_usage = wants_usage(body)
    scored = replace(wanted, n=best_of)
    if best_of > wanted.n and logprobs is None:
        scored = replace(scored, top_logprobs=0)  # by which the best are chosen
    answering = await service.answers.complete(prompts, scored)
    return CompletionReply(
        stream=stream,
        answering=answering,
        model=model,
        fingerprint=service.fingerprint(model),
        language=service.answers.language,
        kept=wanted.n,
        echoed=prompts if echo else None,
        logprobs=logprobs is not None,
        include_usage=include_usage,
    )


def _prompts(body: Fields) -> list[Prompt]:
    """The four shapes: a text, texts, tokens, lists of tokens."""
    value = body.required("prompt")
    if isinstance(value, str):
        return [value]
    items = body.array("prompt", 2**22)
    if not items:
        raise body.wrong("prompt", "is empty; give a text or tokens")
    if all(type(item) is int for item in items):
        return [tuple(items)]
    if len(items) > MAX_ANSWERS:
        raise body.wrong("prompt", f"has {len(items)} prompts; send at most {MAX_ANSWERS}")
    if all(isinstance(item, str) for item in items):
        return list(items)
    if all(isinstance(item, list) and all(type(t) is int for t in item) for item in items):
        return [tuple(item) for item in items]
    raise body.wrong("prompt", "must be a string, strings, token ids, or lists of token ids")


@dataclass
class _Text:
    """A choice in the making; `offset` is where its next token begins."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offset: int = 0
    finish: str = ""

    @property
    def score(self) -> float:
        """The mean log-probability of its tokens."""
        logprobs = [token.logprob or 0.0 for token in self.tokens]
        return sum(logprobs) / max(len(logprobs), 1)


class CompletionReply:
    """`kept` of the answers to each prompt are returned; `echoed` are prompts to put in front."""

    def __init__(
        self,
        *,
        stream: bool,
        answering: Answering,
        model: str,
        fingerprint: str,
        language: Language,
        kept: int,
        echoed: Sequence[Prompt] | None,
        logprobs: bool,
        include_usage: bool,
    ) -> None:
        self.stream = stream
        self.answering = answering
        self._language = language
        self._kept = kept
        self._echoed = echoed
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        made = self.answering.n
        texts = [_Text() for _ in range(made * len(self.answering.prompts))]
        async for choice, event in self.answering:
            if isinstance(event, Step | End):
                texts[choice].text += _text(event)
            if isinstance(event, Step):
                texts[choice].tokens.extend(event.tokens)
            elif isinstance(event, End):
                texts[choice].finish = FINISH[event.reason]
        choices: list[dict[str, Any]] = []
        for prompt in range(len(self.answering.prompts)):
            group = texts[prompt * made : (prompt + 1) * made]
            if self._kept < made:
                group = sorted(group, key=lambda text: -text.score)[: self._kept]
            for text in group:
                body = self._choice(text, self._echo(prompt) + text.text, text.tokens, text.finish)
                choices.append({"index": len(choices), **body})
        return {**self._head, "choices": choices, "usage": usage(self.answering.usage)}

    async def events(self) -> AsyncIterator[str]:
        made = self.answering.n
        texts = [_Text() for _ in range(made * len(self.answering.prompts))]
        if self._echoed is not None:
            for choice, text in enumerate(texts):
                yield self._chunk(choice, self._choice(text, self._echo(choice // made), ()))
        async for choice, event in self.answering:
            if isinstance(event, Step):
                written = _text(event)
                if written or self._logprobs:
                    body = self._choice(texts[choice], written, event.tokens)
                    yield self._chunk(choice, body)
            elif isinstance(event, End):
                reason = FINISH[event.reason]
                body = self._choice(texts[choice], _text(event), (), reason)
                yield self._chunk(choice, body)
        if self._include_usage:
            yield data({**self._head, "choices": [], "usage": usage(self.answering.usage)})
        yield DONE

    def error_event(self, problem: Problem, request_id: str) -> str:
        return DIALECT.error_event(problem, request_id)

    def _choice(
        self, state: _Text, text: str, tokens: Sequence[Token], finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and (tokens or (finish and not self.stream)):
            names = self._language.tokens
            logprobs, state.offset = completion_logprobs(tokens, names, state.offset)
        return {"text": text, "logprobs": logprobs, "finish_reason": finish}

    def _chunk(self, choice: int, body: dict[str, Any]) -> str:
        written = {**self._head, "choices": [{"index": choice, **body}]}
        return data({**written, "usage": None} if self._include_usage else written)

    def _echo(self, prompt: int) -> str:
        if self._echoed is None:
            return ""
        given = self._echoed[prompt]
        return given if isinstance(given, str) else self._language.decode(given)


def _text(event: Step | End) -> str:
    return "".join(getattr(part, "text", "") for part in event.parts)
