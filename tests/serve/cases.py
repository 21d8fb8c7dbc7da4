"""Tiny quantized models in an engine, and what asking it takes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm

import optiq
from optiq.kv import attach, route
from optiq.serve.engine.engine import Engine
from optiq.serve.engine.request import (
    Event,
    Failed,
    Finished,
    Piece,
    Reading,
    Request,
    Sampling,
    Token,
)
from tests.tiny import VOCAB, tiny_folder

NEVER_ENDS = dict.fromkeys(range(3), -100.0)  # bias of bos, eos and pad


def model_and_tokenizer(
    parent: Path, kind: str = "llama", kv: str | None = None, **config: Any
) -> tuple[nn.Module, Any]:
    """4-bit weights and native layers; every product gives a row the same bits in any company."""
    model, tokenizer = mlx_lm.load(str(tiny_folder(parent, kind, **config)))[:2]
    nn.quantize(model, group_size=32, bits=4)
    if kv is not None:
        model = attach(model, kv)
    optiq.accelerate(model)
    if kv is not None:
        route(model)
    return model, tokenizer


@dataclass(frozen=True)
class Answered:
    """All that one request was told."""

    events: tuple[Event, ...]

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Piece))

    @property
    def tokens(self) -> list[Token]:
        return [t for e in self.events if isinstance(e, Piece) for t in e.tokens]

    @property
    def ids(self) -> list[int]:
        return [t.id for t in self.tokens]

    @property
    def last(self) -> Any:
        return self.events[-1]

    @property
    def answer(self) -> tuple[str, list[Token], str]:
        """What must not depend on company."""
        reason = self.last.reason if isinstance(self.last, Finished) else repr(self.last)
        return self.text, self.tokens, reason


class Asked:
    """A request that is on its way."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._events: list[Event] = []
        self._over = threading.Event()
        self._engine = engine
        self.ticket = engine.submit(request, self._listen)

    def _listen(self, event: Event) -> None:
        assert not self._over.is_set(), "an event after the last one"
        assert isinstance(event, (Reading, Piece, Finished, Failed))
        self._events.append(event)
        if isinstance(event, (Finished, Failed)):
            self._over.set()

    def cancel(self) -> None:
        self._engine.cancel(self.ticket)

    def result(self, timeout: float = 60) -> Answered:
        assert self._over.wait(timeout), "no last event"
        return Answered(tuple(self._events))


def ask(engine: Engine, request: Request) -> Answered:
    return Asked(engine, request).result()


def ask_all(
    engine: Engine,
    requests: Sequence[Request],
    between: Callable[[int, list[Asked]], object] = lambda i, asked: None,
) -> list[Answered]:
    """All at once; `between` is called after each submission."""
    asked: list[Asked] = []
    for i, request in enumerate(requests):
        asked.append(Asked(engine, request))
        between(i, asked)
    return [a.result() for a in asked]


def prompt(r: random.Random, length: int) -> tuple[int, ...]:
    return tuple(r.randrange(3, VOCAB) for _ in range(length))


def requests(seed: int, count: int, longest: int = 120) -> list[Request]:
    """Requests of all kinds."""
    r = random.Random(seed)
    return [
        Request(
            prompt(r, r.choice([1, 2, 9, 30, longest])),
            max_tokens=r.choice([1, 4, 20, 60]),
            sampling=Sampling(
                temperature=r.choice([0.0, 0.7, 1.5]),
                top_p=r.choice([1.0, 0.8]),
                top_k=r.choice([0, 5]),
                min_p=r.choice([0.0, 0.05]),
                repetition_penalty=r.choice([1.0, 1.2]),
                presence_penalty=r.choice([0.0, 0.5]),
                frequency_penalty=r.choice([0.0, 0.3]),
                logit_bias=r.choice([{}, NEVER_ENDS]),
                seed=i,
            ),
            top_logprobs=r.choice([None, 0, 3]),
            stop=r.choice([(), ("e", "zz")]),
            client=r.choice(["", "a", "b"]),
        )
        for i in range(count)
    ]
