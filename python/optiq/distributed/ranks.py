"""Several processes on one job, as `mlx.launch` starts them: who I am, and what the others found.

What ranks hand to each other goes through rank 0 over connections of their own, since a rank that
waits there uses no processor. The only module that names mx.distributed. Its collectives block for
ever when a peer is gone, so every rank holds a connection to rank 0 beside them, over which both
say twice a second that they are alive. A connection that ends, or is silent for SILENCE seconds,
means a dead rank; the others are told, and every process ends with an error that names it. Only
ending the process can free a thread that waits in a collective, so work must be on disk as it is
done (see --resume).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DistributedError
from .watch import SILENCE, Watch

JOIN = 25.0  # seconds for all ranks to start
NOTICE = 5.0  # seconds in which a lost rank is noticed, and then to clear up

# Set for each process by mlx.launch (ring, jaccl) and by mpirun.
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # a batch system may start a single one so

_GUARD = """
import os, select, signal, sys
if not select.select([sys.stdin], [], [], float(sys.argv[2]))[0]:
    print(sys.argv[3], file=sys.stderr, flush=True)
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


class World:
    """`size` processes of which this is number `rank`."""

    def __init__(self, rank: int, size: int, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._connections: list[socket.socket] = []
        self.watch: Watch | None = None
        self._meeting: dict[int, socket.socket] | None = None

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order; waits for all of them.

        Anything that JSON can hold, with arrays in it; tuples arrive as lists.
        """
        if self.size == 1:
            return [value]
        from . import wire  # here: it loads MLX

        with self._talking():
            if self.rank != 0:
                wire.send(self._peer(0), value)
                found: list[Any] = wire.receive(self._peer(0))
                return [*found[: self.rank], value, *found[self.rank :]]
            found = [value, *map(wire.receive, self._others())]
            for rank, peer in enumerate(self._others(), start=1):
                wire.send(peer, [*found[:rank], *found[rank + 1 :]])
            return found

    def bring(self, value: Any, to: int) -> list[Any] | None:
        """The value of every rank, in order, at the rank `to`; None elsewhere."""
        if self.size == 1:
            return [value]
        from . import wire

        with self._talking():
            if self.rank == 0:
                others = [
                    None if rank == to else wire.receive(self._peer(rank))
                    for rank in range(1, self.size)
                ]
                if to == 0:
                    return [value, *others]
                wire.send(self._peer(to), [value, *others])
            elif self.rank == to:
                found: list[Any] = wire.receive(self._peer(0))
                return [*found[:to], value, *found[to + 1 :]]
            else:
                wire.send(self._peer(0), value)
        return None

    def divide(self, costs: Sequence[float]) -> list[int]:
        """The rank of each of so many pieces of work: the longest first, each to who has least."""
        loads, found = [0.0] * self.size, [0] * len(costs)
        for n in sorted(range(len(costs)), key=lambda n: -costs[n]):
            found[n] = min(range(self.size), key=loads.__getitem__)
            loads[found[n]] += costs[n]
        return found

    def share(self, costs: Sequence[float]) -> list[int]:
        """The numbers of the pieces of work that are this rank's, in order."""
        return [n for n, rank in enumerate(self.divide(costs)) if rank == self.rank]

    def join(self, own: Mapping[int, Any]) -> list[Any]:
        """What all ranks made of their shares, in the order of the numbers."""
        parts = [part.items() for part in self.gather({str(n): found for n, found in own.items()})]
        found = {int(n): value for part in parts for n, value in part}
        return [found[n] for n in sorted(found)]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """The block exchanges values as it goes, so it cannot be run again by one rank alone."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if self.size == 1:
                raise
            raise DistributedError(f"this rank has failed ({error})") from error

    def sum(self, values: dict[str, Any]) -> dict[str, Any]:
        """The arrays (float32, by the same names on every rank) added up over the ranks."""
        if self.size == 1:
            return values
        import mlx.core as mx

        names = sorted(values)
        joined = mx.concatenate([values[name].reshape(-1) for name in names])
        total = mx.distributed.all_sum(joined, group=self._group)
        mx.eval(total)
        ends = np.cumsum([values[name].size for name in names])[:-1].tolist()
        parts = zip(names, mx.split(total, ends), strict=True)
        return {name: part.reshape(values[name].shape) for name, part in parts}

    def total(self, x: Any) -> Any:
        """The sum of an array over all ranks: the same bits on every rank, and for a row whatever
        rows are beside it. (The ring adds the parts of an array in different orders.)"""
        if self.size == 1:
            return x
        each = self._all_of(x)
        return sum((each[rank] for rank in range(1, self.size)), start=each[0])

    def side_by_side(self, x: Any) -> Any:
        """The arrays of all ranks, one after the other along the last axis."""
        if self.size == 1:
            return x
        import mlx.core as mx

        return mx.moveaxis(self._all_of(x), 0, -2).reshape(*x.shape[:-1], -1)

    def _all_of(self, x: Any) -> Any:
        import mlx.core as mx

        return mx.distributed.all_gather(x[None], group=self._group)

    def connections(self) -> dict[int, socket.socket]:
        """New connections between rank 0 and each other rank, by the peer's rank; all ranks have to
        ask for them together."""
        peers = _connect(self) if self.size > 1 else {}
        for peer in peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections += peers.values()
        return peers

    def give_up_after(self, seconds: float) -> None:
        """From now on, ranks that are silent for so long; all ranks have to say so."""
        if self.watch is not None:
            self.watch.silence = seconds

    def close(self) -> None:
        """The connections that were asked for."""
        for connection in self._connections:
            connection.close()
        self._connections, self._meeting = [], None

    def same(self, job: dict[str, Any]) -> None:
        """Raise DistributedError, naming the keys, unless all ranks give the same values."""
        first, *others = self.gather(job)
        for rank, theirs in enumerate(others, start=1):
            differing = [key for key in first if theirs.get(key) != first[key]]
            if differing:
                raise DistributedError(
                    f"rank {rank} has another {', '.join(differing)} than rank 0; give all ranks "
                    "the same model, options and versions"
                )

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            time.sleep(NOTICE)  # the watch ends this process, and says why
            raise DistributedError(f"the connection to another rank is lost ({error})") from error

    def _peer(self, rank: int) -> socket.socket:
        if self._meeting is None:
            self._meeting = self.connections()
        return self._meeting[rank]

    def _others(self) -> list[socket.socket]:
        return [self._peer(rank) for rank in range(1, self.size)]

    def _meet(self, value: Any) -> Any:
        """What rank 0 says, over the collective."""
        data = json.dumps(value).encode()
        sizes = self._all(np.array([len(data)], np.int32))[:, 0]
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        return json.loads(self._all(padded)[0, : sizes[0]].tobytes())

    def _all(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        import mlx.core as mx

        return np.array(mx.distributed.all_gather(mx.array(row)[None], group=self._group))


ALONE = World(0, 1)


def launched() -> bool:
    """Whether mlx.launch or mpirun started this process as one of several."""
    alone = any(os.environ.get(name) == "1" for name in _SIZES)
    return not alone and any(name in os.environ for name in _LAUNCHED)


def _end(over: threading.Event, reason: str | None) -> None:
    """End this process, whatever it waits for; what clears up behind it has NOTICE seconds."""
    if reason is not None:
        message = f"optiq: {reason}; what is measured is kept, go on with --resume"
        sys.stderr.write(f"\n{message}\n")
        sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGINT)
    over.wait(NOTICE)
    os._exit(DistributedError.exit_code)


@contextmanager
def world(lost: Callable[[str | None], None] | None = None) -> Iterator[World]:
    """The processes that were launched together, while the block runs; one if none were.

    Raises DistributedError when they do not find each other. When a rank dies, fails or is silent
    for too long inside the block, the others call `lost` in a thread of their own, with the reason
    or, where another rank says it, None. By default they print it, interrupt the block and end with
    exit code 1.
    """
    if not launched():
        yield ALONE
        return
    here, peers = _join()
    over = threading.Event()
    with Watch(here.rank, peers, lost or partial(_end, over)) as here.watch:
        try:
            yield here
        finally:
            over.set()
            here.close()


def _join() -> tuple[World, dict[int, socket.socket]]:
    import mlx.core as mx

    try:
        with _guard(f"not all ranks have started within {JOIN:.0f} s"):
            group = mx.distributed.init(strict=True)
            here = World(group.rank(), group.size(), group)
            return here, _connect(here) if here.size > 1 else {}
    except (RuntimeError, OSError) as error:
        raise DistributedError(
            f"the ranks cannot be connected ({error}); check the hosts given to mlx.launch"
        ) from error


@contextmanager
def _guard(reason: str) -> Iterator[None]:
    """End this process if the block takes longer than JOIN seconds.

    MLX waits for the other ranks with the interpreter locked, so only another process can.
    """
    pid, text = str(os.getpid()), f"optiq: {reason}"
    command = [sys.executable, "-S", "-E", "-c", _GUARD, pid, str(JOIN), text]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert guard.stdin is not None
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def _connect(here: World) -> dict[int, socket.socket]:
    """Connections between rank 0 and each other rank, by the peer's rank.

    Rank 0 listens where the launcher's ranks reach it; a secret sent through the collective keeps
    strangers out.
    """
    if here.rank != 0:
        meeting = here._meet(None)
        peer = socket.create_connection((meeting["host"], meeting["port"]), timeout=SILENCE)
        peer.sendall(f"{meeting['secret']} {here.rank}\n".encode("ascii"))
        return {0: peer}
    host, secret = _own_host(), secrets.token_hex(16)
    peers: dict[int, socket.socket] = {}
    with socket.create_server((host, 0)) as server:
        here._meet({"host": host, "port": server.getsockname()[1], "secret": secret})
        while len(peers) < here.size - 1:
            peer, _ = server.accept()
            peer.settimeout(SILENCE)
            word, _, rank = _line(peer).partition(b" ")
            if secrets.compare_digest(word, secret.encode()):
                peers[int(rank)] = peer
            else:
                peer.close()
    return peers


def _line(peer: socket.socket) -> bytes:
    """The first line that a peer sends, of at most 100 bytes."""
    data = b""
    with suppress(OSError):
        while not data.endswith(b"\n") and len(data) < 100 and (byte := peer.recv(1)):
            data += byte
    return data.strip()


def _own_host() -> str:
    """The address at which rank 0 is known to the others."""
    if file := os.environ.get("MLX_HOSTFILE"):
        address: str = json.loads(Path(file).read_text())[0][0]
        return address.rsplit(":", 1)[0]
    if address := os.environ.get("MLX_JACCL_COORDINATOR", ""):
        return address.rsplit(":", 1)[0]
    return socket.gethostbyname(socket.gethostname())
