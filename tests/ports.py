"""Ports for ranks, which are told where to listen before they do."""

from __future__ import annotations

import json
import random
import socket
from contextlib import ExitStack
from pathlib import Path

# Below the ports that Linux and macOS give to those who ask for any: no test that runs beside, and
# no client, is given one of these between the check and its use.
RANGE = range(20000, 32000)
DRAW = random.Random()  # of its own, because tests seed the global one


def free_ports(count: int) -> range:
    """So many ports of loopback in a row that nobody listens on."""
    for _ in range(100):
        first = DRAW.randrange(RANGE.start, RANGE.stop - count)
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return range(first, first + count)
    raise OSError(f"no {count} free ports in a row on loopback from {RANGE.start} on")


def hostfile(folder: Path, ranks: int) -> Path:
    """A file of one address for each rank, as mlx.launch writes it."""
    file = folder / "hosts.json"
    file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    return file
