"""A double of the engine, whose answers are what the prompt says.

A prompt that has `SAY:text` is answered with that text, up to the end of the message. Directives
before the colon change how: `SAY(delay=0.1 cached=3):text`, see `Script`.
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

from optiq.errors import DeadlineError, OverloadedError, TooLongError
from optiq.serve.engine.request import Event, Failed, Finished, Piece, Reading, Request, Token

LOGPROB = -0.5
ERRORS = {
    "overloaded": OverloadedError("the queue is full", 7),
    "deadline": DeadlineError("the answer took longer than 1 second"),
    "broken": ZeroDivisionError("a secret of the prompt"),
}

_SAY = re.compile(r"SAY(?:\(([^)]*)\))?:((?:(?!SAY[(:]).)*?)(?=<\|im_end\|>|$)", re.DOTALL)


@dataclass(frozen=True)
class Script:
    """`text` is answered token by token, each after `delay` seconds, the first after `reading`.

    The error `raises` is raised by submit, and `fails` ends the answer after its text. `cached`
    tokens of the prompt are said to be from the cache.
    """

    text: str = "Hello world"
    delay: float = 0.0
    reading: float = 0.0
    cached: int = 0
    raises: str = ""
    fails: str = ""

    @classmethod
    def of(cls, prompt: str) -> Script:
        all_found = list(_SAY.finditer(prompt))
        if not all_found:
            return cls()
        found = all_found[-1]
        options: dict[str, Any] = dict(word.split("=") for word in (found[1] or "").split())
        for name in ("delay", "reading"):
            options[name] = float(options.get(name, 0))
        options["cached"] = int(options.get("cached", 0))
        return cls(found[2], **options)


@dataclass
class ScriptedEngine:
    tokenizer: Any
    context: int = 512
    vocabulary: int = 384
    ready: bool = True
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
        return SimpleNamespace(running=self.running, queued=0, kv_bytes=0)

    @property
    def running(self) -> int:
        return len(self._running)

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
        return Finished(reason, prompt, cached, len(tokens), stop)

    def _token(self, request: Request, token: int) -> Token:
        if request.top_logprobs is None:
            return Token(token)
        others = [(other, -9.0 - other) for other in range(4, 24)]
        top = ((token, LOGPROB), *others)
        return Token(token, LOGPROB, top[: request.top_logprobs])
