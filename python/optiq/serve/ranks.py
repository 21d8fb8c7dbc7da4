"""One model in several ranks: rank 0 answers, the others make the same calls of sequences.py.

Each rank has its share of the weights (nn/shard.py) and of what the caches hold. Before rank 0
makes a call it sends it to the others, a line of JSON over a connection beside MLX's, where they
wait for it; so a server with nothing to do takes no time. Tokens are drawn on rank 0 alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import mlx.nn as nn

from ..base.text import one_line
from ..distributed.ranks import World
from ..distributed.restart import RESTART
from ..errors import DistributedError
from ..kv.rows import Caches, Unbatchable
from .engine.adapters import Mounted
from .engine.model import Measured
from .engine.sampling import Floats
from .engine.sequences import Held, Prefixes, Sequences

SILENCE = 8.0  # seconds without a sign of life from a rank, after which it is given up
FAREWELL = 1.0  # for clients to read why their answers ended
LOOK = 0.3  # seconds after an error in which it is found that a rank has died, and which one
CALLS = frozenset({"open", "close", "read", "logits", "cut", "keep"})


class Ranked(Sequences):
    """The share of this rank in all sequences."""

    def __init__(
        self, model: nn.Module, measured: Measured, prefix: Prefixes | None, *, world: World
    ) -> None:
        """Raises DistributedError where the ranks are not alike."""
        super().__init__(model, measured, prefix)
        self._world = world
        alike = ("context", "vocabulary", "grid", "states", "together", "beside", "drafts")
        world.same({name: getattr(measured, name) for name in alike})
        self.peers = world.connections()

    def agreed(self, nbytes: int) -> int:
        """The least of all ranks."""
        least: int = min(self._world.gather(nbytes))
        return least

    def _find(self, sequence: Held, tokens: Sequence[int]) -> tuple[Caches, int]:
        """What all ranks have: each forgets by itself, and those with more bytes sooner."""
        caches, length = super()._find(sequence, tokens)
        while True:
            lengths = self._world.gather(length)
            if min(lengths) == max(lengths):
                return caches, length
            caches, length = super()._find(sequence, tokens[: min(lengths) + 1])


class Leading(Ranked):
    """On rank 0: tells the others each call before it makes it.

    After an error nobody knows what the ranks hold, so it is the end of all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        measured: Measured,
        prefix: Prefixes | None,
        *,
        world: World,
        loss: Loss,
    ) -> None:
        super().__init__(model, measured, prefix, world=world)
        self._loss = loss

    def open(
        self, ticket: int, tokens: Sequence[int], adapter: Mounted | None = None, adapted: int = 0
    ) -> int:
        with self._told("open", ticket, list(tokens)):
            return super().open(ticket, tokens)

    def close(self, ticket: int) -> None:
        if ticket in self._open:
            with self._told("close", ticket):
                super().close(ticket)

    def read(self, ticket: int, begin: int, tokens: Sequence[int]) -> None:
        with self._told("read", ticket, begin, list(tokens)):
            super().read(ticket, begin, tokens)

    def logits(
        self,
        tickets: Sequence[int],
        inputs: Sequence[Sequence[int]],
        reader: int | None = None,
        begin: int = 0,
        tokens: Sequence[int] = (),
    ) -> Floats:
        with self._told("logits", tickets, inputs, reader, begin, list(tokens)):
            return super().logits(tickets, inputs, reader, begin, tokens)

    def cut(self, ticket: int, length: int) -> None:
        with self._told("cut", ticket, length):
            super().cut(ticket, length)

    def keep(self, ticket: int, tokens: Sequence[int], reading: bool = False) -> None:
        with self._told("keep", ticket, list(tokens), reading):
            super().keep(ticket, tokens, reading)

    @contextmanager
    def _told(self, name: str, *arguments: Any) -> Iterator[None]:
        try:
            if not self._loss.happened:
                line = json.dumps([name, arguments]).encode() + b"\n"
                for peer in self.peers.values():
                    peer.sendall(line)
            yield
        except Unbatchable:  # on every rank, before any has computed something
            raise
        except Exception as error:
            time.sleep(LOOK)
            self._loss(f"rank 0 failed: {one_line(error)}")
            raise


def follow(sequences: Ranked) -> None:
    """On another rank: make the calls of rank 0, until it ends."""
    with sequences.peers[0].makefile("rb") as lines:
        for line in lines:
            name, arguments = json.loads(line)
            if name not in CALLS:
                raise DistributedError(f"rank 0 asks for {name!r}; give all ranks one version")
            with suppress(Unbatchable):
                getattr(sequences, name)(*arguments)


class Ending(Protocol):
    """An engine."""

    def lose(self, fault: str) -> None: ...


class Loss:
    """What becomes of this process when a rank is lost: MLX cannot connect ranks again within it,
    so it ends, on rank 0 after clients were told.

    Ranks that were `serving` should be started again; before that it is of no use.
    """

    def __init__(self) -> None:
        self.serving = False
        self.engine: Ending | None = None  # on rank 0
        self.happened = False
        self._lock = threading.Lock()

    def __call__(self, reason: str | None) -> None:
        with self._lock:
            if self.happened:
                return
            self.happened = True
        if reason is not None:
            sys.stderr.write(f"optiq serve: {reason}; all ranks end\n")
            sys.stderr.flush()
        if self.engine is not None:
            self.engine.lose(f"the server lost a rank ({reason}); ask again")
            time.sleep(FAREWELL)
        os._exit(RESTART if self.serving else DistributedError.exit_code)


def end_with_rank_0(seconds: float) -> None:
    """Signals that are meant for all ranks end this one when rank 0 has ended, or then."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: signal.alarm(int(seconds)))
