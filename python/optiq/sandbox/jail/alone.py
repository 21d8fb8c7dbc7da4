"""A worker without a zygote, as on macOS: the sandbox is around the process from its start."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from typing import Any, NoReturn

from . import wire, worker


def main(channel: str, peer: str, orders: str) -> NoReturn:
    """Set the kernel's limits, see that the sandbox is there, and do what the host orders."""
    order: dict[str, Any] = json.loads(orders)
    _place(int(channel), int(peer))
    os.chdir(order["work"])
    os.umask(0o077)
    os.environ.update(HOME=order["work"], TMPDIR=order["work"])
    sys.path += [order["path"]] if order["path"] else []
    _limit(order["limits"])
    try:
        os.listdir("/")
    except PermissionError:
        wire.send(worker.CHANNEL, {"locked": True})
        worker.obey()
    wire.send(worker.CHANNEL, {"unlocked": "the root folder can be listed"})
    os._exit(1)


def _place(channel: int, peer: int) -> None:
    """Put the descriptors where a worker expects them; without a peer it is closed."""
    spare = [os.dup(channel), os.dup(peer)] if peer >= 0 else [os.dup(channel)]
    high = max(worker.PEER, *spare) + 1
    for source, target in zip(
        [os.dup2(d, high + i) for i, d in enumerate(spare)], (3, 4), strict=False
    ):
        os.dup2(source, target)
    os.closerange(3 + len(spare), 4096)


def _limit(limits: dict[str, Any]) -> None:
    """What macOS keeps by itself; it takes no limit on memory, which the host watches."""
    seconds = math.ceil(limits["cpu"])
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
