"""A server under mixed load for a while: `python -m bench.soak [MODEL] [--requests 3000]`.

A third of the requests is malformed, cancelled or disconnected, on a random schedule. Every
well-formed one has to be answered as it is alone; afterwards memory, threads and files have to be
what they were. Prints the figures, and exits with 1 where one is out of bounds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx

import optiq  # noqa: F401  (before mlx)
from optiq.serve.server import Server
from tests.tiny import tiny_folder

PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/completions")
M_ARENA_MAX = -8
GROWTH = 1.02  # most that memory may grow
WORDS = ("river", "evening", "light", "boxes", "pens", "weather", "Lisbon", "capital", "answer")


@dataclass
class Soak:
    """What is asked, and what came of it. `alone` has the answers of requests asked alone."""

    url: str
    model: str
    bodies: list[tuple[str, dict[str, Any]]]
    alone: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=600, trust_env=False)

    def ask(self, client: httpx.Client, number: int, stream: bool) -> str:
        """The words of an answer."""
        path, body = self.bodies[number]
        if not stream:
            answer = client.post(path, json=body)
            while answer.status_code in (503, 529):  # overloaded, as it says
                time.sleep(0.2)
                answer = client.post(path, json=body)
            answer.raise_for_status()
            return words(answer.json())
        text = ""
        with client.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.status_code in (503, 529):
                return self.ask(client, number, False)
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += words(json.loads(line[6:]))
        return text

    def one(self, seed: int) -> None:
        draw = random.Random(seed)
        time.sleep(draw.random() * 0.05)
        number, fate = draw.randrange(len(self.bodies)), draw.random()
        with self.client() as client:
            try:
                if fate < 1 / 9:
                    self.malformed(client, draw)
                elif fate < 2 / 9:
                    self.cancelled(client, number, draw)
                elif fate < 3 / 9:
                    self.disconnected(client, number, draw)
                else:
                    text = self.ask(client, number, draw.random() < 0.5)
                    self.outcomes["answered"] += 1
                    if text != self.alone[number]:
                        self.wrong.append(f"{number}: {text!r} is not {self.alone[number]!r}")
            except Exception as error:
                self.wrong.append(f"{number}: {type(error).__name__}: {error}")

    def malformed(self, client: httpx.Client, draw: random.Random) -> None:
        path = draw.choice(PATHS)
        content = draw.choice([b"{", b"[]", b'{"messages": 5}', b'{"stop": [5]}', b"\xff"])
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
        self.outcomes["malformed"] += 1
        if answer.status_code != 400:
            self.wrong.append(f"{content!r} was answered with {answer.status_code}")

    def cancelled(self, client: httpx.Client, number: int, draw: random.Random) -> None:
        """The client leaves in the middle of a stream."""
        path, body = self.bodies[number]
        with client.stream("POST", path, json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()
            for _ in range(draw.randrange(6)):
                next(lines, None)
        self.outcomes["cancelled"] += 1

    def disconnected(self, client: httpx.Client, number: int, draw: random.Random) -> None:
        """The client leaves while it waits for an answer that is not streamed."""
        path, body = self.bodies[number]
        try:
            client.post(path, json=body, timeout=0.01 + 0.1 * draw.random())
        except httpx.TimeoutException:
            self.outcomes["disconnected"] += 1
        else:
            self.outcomes["answered before it left"] += 1


def words(body: Any) -> str:
    """Texts of a response or an event, of any of the protocols."""
    if isinstance(body, dict):
        own = "".join(v for k, v in body.items() if k in ("content", "text") and isinstance(v, str))
        return own + "".join(words(v) for v in body.values())
    return "".join(map(words, body)) if isinstance(body, list) else ""


def requests(model: str, count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests of all kinds, each with a seed."""
    draw = random.Random(seed)
    bodies = []
    for number in range(count):
        path = draw.choice(PATHS)
        say = " ".join(draw.choices(WORDS, k=draw.randrange(3, 40)))
        body: dict[str, Any] = {"model": model, "max_tokens": draw.randrange(1, 40)}
        if path == "/v1/completions":
            body |= {"prompt": say, "seed": number}
        else:
            body |= {"messages": [{"role": "user", "content": say}]}
            body |= {"temperature": 0} if path == "/v1/messages" else {"seed": number}
        bodies.append((path, body))
    return bodies


def memory() -> int:
    """Resident bytes, without what MLX and malloc keep to use again."""
    gc.collect()
    mx.clear_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def one_arena() -> None:
    """Have malloc keep one heap for all threads, so that its size is not a matter of chance."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def footprint() -> tuple[int, int]:
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


def settled(soak: Soak) -> None:
    """Wait until nothing runs."""
    with soak.client() as client:
        while True:
            lines = client.get("/metrics").text.splitlines()
            if {"optiq_running 0.0", "optiq_waiting 0.0"} <= set(lines):
                return
            time.sleep(0.05)


def burst(soak: Soak, seeds: range, streams: int) -> None:
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(soak.one, seeds))
    settled(soak)


def run(model: str | Path, count: int, streams: int, seed: int) -> bool:
    one_arena()
    before = footprint()
    with Server.open(model, port=0, name="soak", prefix_memory=2**24, drain=0.0) as server:
        soak = Soak(server.url, "soak", requests("soak", 60, seed))
        with soak.client() as client:
            soak.alone = [soak.ask(client, i, False) for i in range(len(soak.bodies))]
        burst(soak, range(seed + 10**6, seed + 10**6 + count), streams)  # heaps find their size
        soak.outcomes.clear()
        start, running = memory(), footprint()
        began = time.perf_counter()
        burst(soak, range(seed, seed + count), streams)
        seconds = time.perf_counter() - began
        time.sleep(1)  # connections close
        end, after = memory(), footprint()
    time.sleep(1)  # threads end
    print(f"{count} requests, {streams} at a time, in {seconds:.0f} s: {dict(soak.outcomes)}")
    print(f"memory {start / 1e6:.1f} -> {end / 1e6:.1f} MB, {end / start - 1:+.1%}")
    print(f"threads and files {running} -> {after} while it serves; {before} -> {footprint()}")
    for line in soak.wrong[:10]:
        print(f"wrong: {line}", file=sys.stderr)
    print(f"{len(soak.wrong)} were not answered as alone")
    return not soak.wrong and end <= GROWTH * start and after <= running


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="default: a tiny random one")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or tiny_folder(Path(folder))
        return 0 if run(model, args.requests, args.streams, args.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
