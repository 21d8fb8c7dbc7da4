"""A model, and a double of the engine, whose answers are what the prompt says.

A prompt that has `SAY:text` is answered with that text, up to the end of the message, or of the
line where there is no chat template. Directives before the colon change how:
`SAY(delay=0.1):text`, see `Script`.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from optiq.errors import DeadlineError, OverloadedError, TooLongError
from optiq.serve.engine.answers import Stats
from optiq.serve.engine.request import Event, Failed, Finished, Piece, Reading, Request, Token
from tests.tiny import EOS

LOGPROB = -0.5
ERRORS = {
    "overloaded": OverloadedError("the queue is full", 7),
    "deadline": DeadlineError("the answer took longer than 1 second"),
    "broken": ZeroDivisionError("a secret of the prompt"),
}

START = "<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
_SAY = re.compile(r"SAY(?:\(([^)]*)\))?:((?:(?!SAY[(:]).)*?)(?=<\|im_end\|>|$)", re.DOTALL)


@dataclass(frozen=True)
class Script:
    """`text` is answered token by token, each after `delay` seconds, the first after `reading`.

    With `fails` the answer ends with that error after its text; the model knows "broken" only. For
    the double alone, submit raises `raises`, and `cached` tokens are said to be from the cache.
    """

    text: str = "Hello world"
    delay: float = 0.0
    reading: float = 0.0
    cached: int = 0
    raises: str = ""
    fails: str = ""

    @classmethod
    def of(cls, prompt: str) -> Script:
        if "<|im_start|>" not in prompt:
            prompt = prompt.partition("\n")[0]
        all_found = list(_SAY.finditer(prompt))
        if not all_found:
            return cls()
        options: dict[str, Any] = dict(word.split("=") for word in (all_found[-1][1] or "").split())
        for name in ("delay", "reading"):
            options[name] = float(options.get(name, 0))
        options["cached"] = int(options.get("cached", 0))
        return cls(all_found[-1][2], **options)


class ScriptedModel(nn.Module):
    """A model that runs in the real engine. Its caches hold tokens in the place of keys."""

    def __init__(self, tokenizer: Any, context: int = 512, vocabulary: int = 384) -> None:
        super().__init__()
        self.args = SimpleNamespace(max_position_embeddings=context)
        self.layers: list[nn.Module] = []
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def make_cache(self) -> list[KVCache]:
        return [KVCache()]

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        tokens = inputs[:, None, :, None].astype(mx.float32)
        rows = getattr(cache[0], "rows", cache)
        histories = [
            np.array(row.update_and_fetch(tokens[i : i + 1], tokens[i : i + 1])[0])
            for i, row in enumerate(rows)
        ]
        logits = np.zeros((*inputs.shape, self._vocabulary), np.float32)
        wait = 0.0
        for row, history in zip(logits, histories, strict=True):
            seconds, token = self._next([int(t) for t in history.ravel()], inputs.shape[1])
            wait = max(wait, seconds)
            row[-1, token] = 100.0
        time.sleep(wait)
        return mx.array(logits)

    def _next(self, history: list[int], new: int) -> tuple[float, int]:
        """Seconds to wait, and the token that follows."""
        text = self._tokenizer.decode(history)
        script = Script.of(text)
        if new > 1:
            return script.reading, 0
        begin = self._begin(history, text)
        said = self._tokenizer.encode(script.text, add_special_tokens=False)
        at = len(history) - begin
        if at == len(said) and script.fails:
            raise ERRORS[script.fails]
        return script.delay, said[at] if 0 <= at < len(said) else EOS

    def _begin(self, history: list[int], text: str) -> int:
        """The number of tokens before the answer."""
        start, no_thought = (
            self._tokenizer.encode(mark, add_special_tokens=False) for mark in (START, NO_THOUGHT)
        )
        if START not in text:
            prompt = "".join(text.partition("\n")[:2])
            return len(self._tokenizer.encode(prompt, add_special_tokens=False))
        begin = len(history)
        while history[begin - len(start) : begin] != start:
            begin -= 1
        if history[begin : begin + len(no_thought)] == no_thought:
            begin += len(no_thought)
        return begin


@dataclass
class ScriptedEngine:
    tokenizer: Any
    context: int = 512
    vocabulary: int = 384
    ready: bool = True
    fault: str = ""
    requests: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tickets = count(1)
        self._running: dict[int, threading.Event] = {}
        self._stop_at = float("inf")

    def start(self) -> None:
        pass

    def close(self, drain: float = 0) -> None:
        self._stop_at = time.monotonic() + drain
        while self._running and time.monotonic() < self._stop_at + 10:
            time.sleep(0.005)

    def stats(self) -> Any:
        return Stats(running=len(self._running))

    def submit(self, request: Request, listener: Callable[[Event], None]) -> int:
        self.requests.append(request)
        script = Script.of(self.tokenizer.decode(list(request.tokens)))
        if script.raises:
            raise ERRORS[script.raises]
        if len(request.tokens) >= self.context:
            raise TooLongError(
                f"{len(request.tokens)} tokens do not fit a context of {self.context}", "messages"
            )
        ticket = next(self._tickets)
        self._running[ticket] = cancel = threading.Event()
        arguments = (ticket, request, script, listener, cancel)
        threading.Thread(target=self._answer, args=arguments, daemon=True).start()
        return ticket

    def cancel(self, ticket: int) -> None:
        cancel = self._running.get(ticket)
        if cancel is not None:
            self.cancelled.append(ticket)
            cancel.set()

    def _answer(
        self,
        ticket: int,
        request: Request,
        script: Script,
        listener: Callable[[Event], None],
        cancel: threading.Event,
    ) -> None:
        end = self._tell(request, script, listener, cancel)
        del self._running[ticket]
        listener(end)

    def _tell(
        self,
        request: Request,
        script: Script,
        listener: Callable[[Event], None],
        cancel: threading.Event,
    ) -> Event:
        """Tells what comes before the end, and returns the end."""
        prompt, cached = len(request.tokens), script.cached
        listener(Reading(cached, prompt, cached))
        cancel.wait(script.reading)
        listener(Reading(prompt, prompt, cached))
        text, stop = script.text, None
        for candidate in request.stop:
            if candidate in text:
                text, stop = text[: text.index(candidate)], candidate
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        most = min(request.max_tokens, self.context - prompt)
        reason = "stop" if stop is None else "stop_text"
        if len(tokens) >= most:
            tokens, reason, stop = tokens[:most], "length", None
        told = ""
        for i, token in enumerate(tokens):
            if cancel.wait(script.delay):
                return Finished("cancelled", prompt, cached, i)
            if time.monotonic() > self._stop_at:
                return Failed(OverloadedError("the server is stopping", 5))
            text = self.tokenizer.decode(tokens[: i + 1])
            new = "" if text.endswith("\ufffd") else text[len(told) :]
            told += new
            listener(Piece(new, (self._token(request, token),)))
        if script.fails:
            return Failed(ERRORS[script.fails])
        generated = len(tokens) + (reason == "stop")  # the end of the answer is a token
        return Finished(reason, prompt, cached, generated, stop)

    def _token(self, request: Request, token: int) -> Token:
        if request.top_logprobs is None:
            return Token(token)
        others = [(other, -9.0 - other) for other in range(4, 24)]
        top = ((token, LOGPROB), *others)
        return Token(token, LOGPROB, top[: request.top_logprobs])
