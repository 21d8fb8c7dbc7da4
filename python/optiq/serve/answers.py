"""From a parsed request to its answers: render, compile, submit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..errors import RequestError
from .answering import Answering, Engine, Heard, Parts, PlainText
from .asked import Chat, Wishes
from .courier import Courier
from .engine.request import Guide, Request
from .language import Language
from .metrics import Metrics
from .preparing import Preparer
from .tools.python import Python
from .tools.rounds import Rounds

MAX_ANSWERS = 128  # of one request


class Answers:
    """Answers requests. Belongs to one event loop."""

    def __init__(
        self,
        engine: Engine,
        language: Language,
        metrics: Metrics,
        preparer: Preparer,
        *,
        answer_tokens: int,
        deadline: float,
        python: Python | None = None,
    ) -> None:
        """With `python` the server runs what the model writes. An answer may take `deadline`
        seconds; without a limit of its own it ends after `answer_tokens`.
        """
        self.engine, self.language, self.python = engine, language, python
        self._metrics = metrics
        self._answer_tokens = answer_tokens
        self._deadline, self.preparer = deadline, preparer
        self._courier: Courier[Heard] | None = None

    async def chat(self, chat: Chat, wishes: Wishes) -> Answering | Rounds:
        """Raises RequestError, TooLongError, OverloadedError, DeadlineError."""
        if chat.interpreter is None or self.python is None:
            return await self._chat(chat, wishes)
        if wishes.n > 1:
            raise RequestError("one answer at a time can run Python; leave 'n' out", "n")
        container = self.python.open(chat.interpreter)
        first = await self._chat(chat, wishes)
        return Rounds(self._chat, self.python, container, chat, wishes, first)

    async def _chat(self, chat: Chat, wishes: Wishes) -> Answering:
        language = self.language

        def prepare() -> tuple[Any, Callable[[], Guide] | None]:
            prompt = language.prompt(chat)
            return prompt, language.guide(chat, prompt)

        prompt, guide = await self.preparer.prepare(prepare)
        request = self._request(prompt.tokens, wishes, prompt.boundaries)
        reader: Callable[[], Parts] = partial(language.reader, chat, prompt)
        answering = self._answering([request], reader, guide, wishes.n)
        answering.remember = partial(language.replays.keep, chat)
        return answering

    async def complete(self, prompts: Sequence[str | tuple[int, ...]], wishes: Wishes) -> Answering:
        """Texts or tokens as they are, without a chat template."""
        if len(prompts) * wishes.n > MAX_ANSWERS:
            raise RequestError(
                f"{len(prompts)} prompts with {wishes.n} answers each are more than "
                f"{MAX_ANSWERS} answers; send several requests",
                "prompt",
            )

        def prepare() -> list[tuple[int, ...]]:
            return [self.language.encode(p) if isinstance(p, str) else p for p in prompts]

        tokens = await self.preparer.prepare(prepare)
        requests = [self._request(each, wishes, ()) for each in tokens]
        return self._answering(requests, PlainText, None, wishes.n)

    async def count(self, chat: Chat) -> int:
        """Tokens of the prompt that a conversation becomes."""
        return len((await self.preparer.prepare(partial(self.language.prompt, chat))).tokens)

    def _request(
        self, tokens: tuple[int, ...], wishes: Wishes, boundaries: tuple[int, ...]
    ) -> Request:
        return Request(
            tokens=tokens,
            max_tokens=wishes.max_tokens or self._answer_tokens,
            sampling=wishes.sampling,
            stop=wishes.stop,
            top_logprobs=wishes.top_logprobs,
            boundaries=boundaries,
            deadline=self._deadline,
            client=wishes.client,
            adapter=wishes.adapter,
        )

    def _answering(
        self,
        requests: Sequence[Request],
        reader: Callable[[], Parts],
        guide: Callable[[], Guide] | None,
        n: int,
    ) -> Answering:
        readers = [reader] * len(requests)
        if self._courier is None:
            self._courier = Courier(asyncio.get_running_loop())
        return Answering(self.engine, self._metrics, requests, readers, guide, n, self._courier)
