"""Ranks that watch each other, so that none waits for ever for one that is gone.

The collectives of mx.distributed block for ever when a peer is gone, so every rank holds a
connection to rank 0 beside them, over which both say twice a second that they are alive. A
connection that ends, or is silent for SILENCE seconds, means a dead rank; the others are told, and
every process ends with an error that names it.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

SILENCE = 20.0  # seconds without a sign of life
BEAT = 0.5  # seconds between two signs of life
LATE = 2.0  # seconds; a process that comes so late has slept itself, and blames no other


class Watch:
    """Tells the peers of this rank that it lives, and calls `end` with a reason if one does not.

    `peers` are connections by rank: on rank 0 those to all others, elsewhere that to rank 0. As a
    context manager it also tells them how the block ended. The reason that `end` gets is None where
    another rank says it, or has said it.
    """

    def __init__(
        self,
        rank: int,
        peers: Mapping[int, socket.socket],
        end: Callable[[str | None], None],
        *,
        silence: float = SILENCE,
    ) -> None:
        self._rank = rank
        self._peers = dict(peers)
        self._end = end
        self.silence = silence
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._over.set()
        self._thread.join()
        reason = None
        if kind is not None:
            stopped = issubclass(kind, KeyboardInterrupt)
            reason = "was interrupted" if stopped else f"failed: {error or kind.__name__}"
        self._tell({"end": self._rank, "reason": reason})
        for peer in self._peers.values():
            peer.close()

    def _watch(self) -> None:
        heard = dict.fromkeys(self._peers, time.monotonic())
        buffers = dict.fromkeys(self._peers, b"")
        selector = selectors.DefaultSelector()
        for rank, peer in self._peers.items():
            selector.register(peer, selectors.EVENT_READ, rank)
        while not self._over.is_set():
            self._tell({"alive": self._rank})
            until = time.monotonic() + BEAT
            while (left := until - time.monotonic()) > 0 and not self._over.is_set():
                for key, _ in selector.select(min(left, 0.05)):
                    rank = key.data
                    data = _receive(self._peers[rank])
                    heard[rank] = time.monotonic()
                    *lines, buffers[rank] = (buffers[rank] + data).split(b"\n")
                    ended = any(self._ended(json.loads(line)) for line in lines)
                    if ended or not data:
                        selector.unregister(self._peers.pop(rank))
                    if not data and not ended:
                        self._lost(rank, "died")
            now = time.monotonic()
            if now - until > LATE:
                heard = dict.fromkeys(heard, now)
            for rank in self._peers:
                if now - heard[rank] > self.silence:
                    self._lost(rank, f"has not answered for {self.silence:.0f} s")

    def _ended(self, message: dict[str, Any]) -> bool:
        """Take a peer's message; True when it is its last."""
        if "end" not in message:
            return False
        if message["reason"] is not None:
            self._lost(message["end"], message["reason"], first_hand=False)
        return True

    def _lost(self, rank: int, reason: str, *, first_hand: bool = True) -> None:
        if self._rank == 0:  # the others hear only rank 0
            self._tell({"end": rank, "reason": reason})
        said = not first_hand and self._rank != 0
        self._end(None if said else f"rank {rank} {reason}")

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        for peer in list(self._peers.values()):
            with suppress(OSError):  # a broken connection is found where it is read
                peer.sendall(line)


def _receive(peer: socket.socket) -> bytes:
    """What there is to read; nothing at the end of the connection, however it came."""
    try:
        return peer.recv(1 << 16)
    except OSError:
        return b""
