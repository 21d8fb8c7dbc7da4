"""A model that answers: its engine, its language and what protocols need of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

from .answers import Answers
from .language import Language
from .metrics import Metrics
from .models import Listed
from .opening import Opened
from .options import Options
from .preparing import Preparer
from .protocols.protocol import Service
from .protocols.store import ResponseStore
from .tools.python import Python


@dataclass(frozen=True)
class Shared:
    """What all models of a server have in common."""

    options: Options
    metrics: Metrics
    preparer: Preparer
    store: ResponseStore
    python: Python | None


class Running:
    """A model that was opened, and answers until it is closed."""

    def __init__(self, opened: Opened, shared: Shared) -> None:
        options = shared.options
        self.engine, self._prefix = opened.engine, opened.prefix
        answers = Answers(
            self.engine,
            Language(opened.tokenizer, self.engine.vocabulary, self.engine.context),
            shared.metrics,
            shared.preparer,
            answer_tokens=options.answer_tokens,
            deadline=options.deadline,
            python=shared.python,
        )
        # Made from the weights, so that reasoning signed before a restart is still known.
        secret = sha256(b"optiq reasoning " + opened.identity.encode()).digest()
        caching = options.prefix_bytes > 0
        self.service = Service(
            answers, opened.models, secret, caching, shared.store, opened.adapters
        )

    def close(self, drain: float = 0.0) -> None:
        """Let answers finish for `drain` seconds, and end the rest."""
        self.engine.close(drain)
        if self._prefix is not None:
            self._prefix.close()


class Services(Protocol):
    """The models of a server."""

    @property
    def ready(self) -> bool: ...
    @property
    def fault(self) -> str:
        """Why nothing is answered any more; empty while it is."""
        ...

    def start(self) -> None: ...
    def close(self, drain: float) -> None: ...
    def listed(self) -> Sequence[Listed]: ...
    def find(self, name: str | None) -> Listed:
        """Raises Refusal for a name that is not known."""
        ...

    def use(self, name: str | None) -> AbstractAsyncContextManager[Service]:
        """The model of this name, which stays while it is used. Raises Refusal, ServeError."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """The engine's Stats of each model that is loaded."""
        ...


class OneModel:
    """One model, from the start to the end of the server."""

    def __init__(self, running: Running) -> None:
        self._running = running

    @property
    def ready(self) -> bool:
        return self._running.engine.ready

    @property
    def fault(self) -> str:
        return self._running.engine.fault

    def start(self) -> None:
        self._running.engine.start()

    def close(self, drain: float) -> None:
        self._running.close(drain)

    def listed(self) -> Sequence[Listed]:
        models = self._running.service.models
        return [models.listed(name) for name in models.names]

    def find(self, name: str | None) -> Listed:
        models = self._running.service.models
        return models.listed(models.find(name))

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Service]:
        yield self._running.service

    def stats(self) -> Mapping[str, Any]:
        return {self._running.service.model.name: self._running.engine.stats()}
