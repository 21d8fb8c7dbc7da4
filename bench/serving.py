"""Servers beside each other: `optiq serve`, llama-server and mlx_lm.server, in one run.

    python -m bench.serving [--llama-server PROGRAM --gguf FILE] [--mlx-lm] [--rounds 3]
                            [--only FIGURE ...] [--json FILE]

The model is SmolLM2-135M-Instruct in stock 4-bit weights (groups of 64), of the GGUF that
`optiq demo` fetches; --gguf should be of the same size (Q4_0). `llama-server` comes with the source
package of llama-cpp-python: cmake -DLLAMA_BUILD_SERVER=ON in its vendor/llama.cpp.

All servers run as processes of their own, from the start to the end, and are asked over HTTP as
clients do: streamed chat completions at temperature 0, end of text forbidden. In each round each
server has its turn; medians over the rounds with their quartiles, and the median of the ratios
within a round. On a CPU, plain caches of this model are float32, so twice as large as in 16 bits. A
figure of one server alone (`kv`, `overhead`) also has rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from tokenizers import Tokenizer

from optiq.base.machine import machine, versions

STREAMS, TOKENS = 8, 256
FEW = 4  # tokens of a stream of mlx_lm.server, whose 4-bit products are slow on a CPU
LONG = 4000  # tokens of a prompt
CONTEXT = 8192
SLOTS = 8
EOS = (0, 2)  # <|endoftext|> and <|im_end|> of SmolLM2
START = 240  # seconds
WORDS = """river stone light engine garden paper seven window market silver answer music winter
number yellow history simple travel water evening letter mountain"""

Message = dict[str, str]
Samples = dict[str, list[float]]  # by server, a number for each round


@dataclass
class Server:
    """A process that answers on loopback."""

    name: str
    command: Callable[[int], list[str]]  # for a port
    model: str
    few: bool = False
    url: str = ""
    _process: subprocess.Popen[bytes] | None = None

    def start(self, log: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        with log.open("ab") as out:
            self._process = subprocess.Popen(self.command(port), stdout=out, stderr=out)
        self.url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + START
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        self.stop()
        sys.exit(f"{self.name} does not start; see {log}")

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def running(server: Server, log: Path) -> Iterator[Server]:
    server.start(log)
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Answer:
    """When it was asked for, when each piece of it came, and how many tokens it has."""

    asked: float
    pieces: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0

    @property
    def first(self) -> float:
        return self.pieces[0] - self.asked


async def ask(
    server: Server,
    messages: list[Message],
    tokens: int,
    answer: Answer | None = None,
    every_token: bool = False,
) -> Answer:
    """Stream one answer of exactly `tokens` tokens, into `answer` if one is given.

    Text comes in whole characters, so some tokens have no piece of it. With `every_token` each has
    one: its probability comes even where its text does not.
    """
    answer = answer or Answer(0)
    body = {
        "model": server.model, "messages": messages, "max_tokens": tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
        "logit_bias": {str(token): -100 for token in EOS}, "logprobs": every_token,
    }  # fmt: skip
    async with httpx.AsyncClient(timeout=None) as client:
        answer.asked = time.perf_counter()
        url = f"{server.url}/v1/chat/completions"
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                sys.exit(f"{server.name}: {response.status_code} {await response.aread()!r}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _note(json.loads(line[6:]), answer)
    if answer.tokens != tokens:
        sys.exit(f"{server.name} gave {answer.tokens} tokens instead of {tokens}")
    return answer


def _note(chunk: dict, answer: Answer) -> None:
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        if text or choice.get("logprobs"):
            answer.pieces.append(time.perf_counter())
            answer.text += text or ""
    if usage := chunk.get("usage"):
        answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


class Texts:
    """Prompts of words in random order, each other ones: nothing of them is in a cache."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._random = random.Random(18)

    def of(self, tokens: int) -> str:
        """A text of some `tokens` tokens."""
        drawn = self._random.choices(WORDS.split(), k=2 * tokens)
        text = " ".join([f"{self._random.random():.6f}", *drawn])
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return text[: encoding.offsets[tokens - 1][1]]

    def user(self, tokens: int) -> Message:
        return {"role": "user", "content": self.of(tokens)}


# The figures: each takes a server and gives numbers by name, one round.


async def throughput(server: Server, texts: Texts) -> dict[str, float]:
    """Tokens per second of all streams together; of mlx_lm.server once all prompts are read."""
    tokens = FEW if server.few else TOKENS
    answers = await asyncio.gather(*(ask(server, [texts.user(16)], tokens) for _ in range(STREAMS)))
    begin = min(answer.asked for answer in answers)
    if server.few:
        begin, tokens = max(answer.pieces[0] for answer in answers), tokens - 1
    end = max(answer.pieces[-1] for answer in answers)
    return {"tokens/s": STREAMS * tokens / (end - begin)}


async def joining(server: Server, texts: Texts) -> dict[str, float]:
    """Gaps between a stream's tokens while a long prompt is read beside it."""
    stream = Answer(0)
    task = asyncio.create_task(ask(server, [texts.user(16)], LONG, stream, every_token=True))
    while len(stream.pieces) < 200:
        await asyncio.sleep(0.01)
    joined = time.perf_counter()
    other = await ask(server, [texts.user(LONG)], 1)
    read = time.perf_counter()
    if task.done():
        sys.exit(f"{server.name}: the stream ended before the prompt was read")
    task.cancel()  # which ends the answer
    await asyncio.wait([task])
    times = np.array(stream.pieces)
    begin, end = np.searchsorted(times, (joined, read))
    quiet, during = np.diff(times[20:begin]), np.diff(times[begin - 1 : end + 1])
    p99, median = np.quantile(during, 0.99), np.median(quiet)
    return {
        "quiet median, ms": 1e3 * median,
        "quiet p99, ms": 1e3 * np.quantile(quiet, 0.99),
        "median, ms": 1e3 * np.median(during),
        "p95, ms": 1e3 * np.quantile(during, 0.95),
        "p99, ms": 1e3 * p99,
        "longest, ms": 1e3 * during.max(),
        "p99 / quiet median": p99 / median,
        "TTFT of the prompt, s": other.first,
    }


async def conversation(server: Server, texts: Texts) -> tuple[dict[str, float], list[Message]]:
    """Time to first token of a conversation's first turn, and of its second."""
    system = {"role": "system", "content": texts.of(LONG // 2)}
    messages = [system, texts.user(LONG // 2)]
    cold = await ask(server, messages, 32)
    messages += [{"role": "assistant", "content": cold.text}, texts.user(16)]
    second = await ask(server, messages, 32)
    return {
        "cold, ms": 1e3 * cold.first,
        "turn 2, ms": 1e3 * second.first,
        "turn 2 / cold": second.first / cold.first,
        "cached tokens": second.cached_tokens,
    }, messages


async def long_streams(server: Server, prompts: list[list[Message]]) -> dict[str, float]:
    """Tokens per second of streams over long contexts, once all are read, and their bytes."""
    answers, nbytes = [Answer(0) for _ in prompts], 0.0
    asked = asyncio.gather(
        *(
            ask(server, p, TOKENS, a, every_token=True)
            for p, a in zip(prompts, answers, strict=True)
        )
    )
    while not asked.done():
        await asyncio.sleep(0.5)
        nbytes = max(nbytes, await kv_bytes(server))
    await asked
    begin = max(answer.pieces[0] for answer in answers)
    end = min(answer.pieces[-1] for answer in answers)
    tokens = sum(sum(begin < t <= end for t in answer.pieces) for answer in answers)
    return {"tokens/s": tokens / (end - begin), "MB of keys and values": nbytes / 1e6}


async def kv_bytes(server: Server) -> float:
    """Bytes of keys and values that our server says it holds."""
    async with httpx.AsyncClient() as client:
        lines = (await client.get(f"{server.url}/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith("optiq_kv_bytes")).split()[-1])


def overhead(model: Path) -> dict[str, float]:
    """Milliseconds of an engine's step at 8 rows, and how much of it is not the model."""
    import optiq
    from optiq.serve.engine.engine import Engine, EngineOptions
    from optiq.serve.engine.request import Finished, Request, Sampling

    loaded, tokenizer = optiq.load(model)
    engine = Engine(loaded, tokenizer, EngineOptions(running=SLOTS))
    engine.start()
    bias = dict.fromkeys(EOS, -100.0)
    waiting = SLOTS

    def listen(event: object) -> None:
        nonlocal waiting
        waiting -= isinstance(event, Finished)

    for i in range(SLOTS):
        prompt = tuple(range(1000 + i, 1016 + i))
        sampling = Sampling(temperature=0.0, logit_bias=bias)
        engine.submit(Request(prompt, TOKENS, sampling), listen)
    steps, over = [], []
    while waiting == SLOTS:
        time.sleep(0.02)
        stats = engine.stats()
        if stats.running == SLOTS and stats.steps > 20:
            steps.append(stats.step_seconds)
            over.append(stats.overhead_seconds)
    engine.close()
    return {"step, ms": 1e3 * float(np.median(steps)), "not the model, ms": 1e3 * np.median(over)}


# All of them


def stock(gguf: Path, out: Path) -> Path:
    """The model in stock 4-bit weights."""
    from mlx_lm import convert

    from optiq.sources import resolve

    if not (out / "config.json").exists():
        convert(str(resolve(str(gguf)).path), str(out), quantize=True, q_group_size=64, q_bits=4)
    return out


def fetched(folder: Path) -> Path:
    from optiq.quantize.demo import GGUF, fetch_gguf

    path = folder / Path(GGUF).name
    if not path.exists():
        fetch_gguf(folder, path)
    return path


def ours(model: Path, *options: str, name: str = "optiq") -> Server:
    def command(port: int) -> list[str]:
        program = str(Path(sys.executable).with_name("optiq"))
        fixed = ["--port", str(port), "--max-concurrent", str(SLOTS)]
        return [program, "serve", str(model), *fixed, *options]

    return Server(name, command, model.name)


def llama(program: Path, gguf: Path) -> Server:
    threads = str(len(os.sched_getaffinity(0)))

    def command(port: int) -> list[str]:
        size = ["-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "-t", threads]
        return [str(program), "-m", str(gguf), "--port", str(port), "--no-webui", *size]

    return Server("llama-server", command, "model")


def mlx_lm(model: Path) -> Server:
    def command(port: int) -> list[str]:
        return [
            sys.executable,
            "-m",
            "mlx_lm",
            "server",
            "--model",
            str(model),
            "--port",
            str(port),
        ]

    return Server("mlx_lm.server", command, "default_model", few=True)


def quartiles(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.4g} [{low:.4g}, {high:.4g}]"


def show(figure: str, samples: dict[str, Samples]) -> None:
    """`samples` by the name of the number; ratios are of the first server to each other."""
    for name, by_server in samples.items():
        first, *others = by_server
        line = [f"{server} {quartiles(values)}" for server, values in by_server.items()]
        for other in others:
            ratios = np.array(by_server[first][: len(by_server[other])]) / by_server[other]
            line.append(f"{first} / {other} {quartiles(ratios)}")
        print(f"{figure}: {name}: " + "; ".join(line), flush=True)


FIGURES = ("throughput", "joining", "conversation", "kv", "overhead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--mlx-lm", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--without-ours", action="store_true", help="to try the peers alone")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left running
    build = Path("build/serving")
    build.mkdir(parents=True, exist_ok=True)
    gguf = fetched(build)
    model = stock(gguf, build / "SmolLM2-135M-Instruct-4bit")
    texts = Texts(model / "tokenizer.json")
    results: dict[str, dict[str, Samples]] = {}

    def add(figure: str, server: str, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            by_name = results.setdefault(figure, defaultdict(dict))
            by_name[name].setdefault(server, []).append(float(value))

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder, logs = Path(temporary), build / "logs"
        logs.mkdir(exist_ok=True)

        def start(server: Server) -> Server:
            return stack.enter_context(running(server, logs / f"{server.name}.log"))

        cache = ["--prefix-cache", str(folder), "--prefix-cache-bytes", "8GB"]
        servers = [] if args.without_ours else [start(ours(model, *cache))]
        if args.llama_server:
            servers.append(start(llama(args.llama_server, args.gguf or gguf)))
        peer = [start(mlx_lm(model))] if args.mlx_lm and "throughput" in args.only else []
        for _ in range(args.rounds):
            if "throughput" in args.only:
                for server in servers + peer:
                    add("throughput", server.name, asyncio.run(throughput(server, texts)))
                peer = []  # once: minutes
            for server in servers:
                if "joining" in args.only:
                    add("joining", server.name, asyncio.run(joining(server, texts)))
                if "conversation" in args.only:
                    numbers, messages = asyncio.run(conversation(server, texts))
                    if server.name == "optiq":
                        server.stop()
                        server.start(logs / "optiq.log")
                        asyncio.run(ask(server, [texts.user(16)], 4))  # what a first use loads
                        again = asyncio.run(ask(server, messages, 4))
                        numbers["restarted, ms"] = 1e3 * again.first
                        numbers["restarted / cold"] = 1e3 * again.first / numbers["cold, ms"]
                    add("conversation", server.name, numbers)
        stack.close()
        if "kv" in args.only and not args.without_ours:
            prompts = [[texts.user(LONG)] for _ in range(STREAMS)]
            pair = [
                start(ours(model, "--kv", "8/4", name="8-4 bits")),
                start(ours(model, name="plain")),
            ]
            for server in pair:
                asyncio.run(long_streams(server, prompts))  # read once, in the prefix cache then
            for _ in range(args.rounds):
                for server in pair:
                    add("kv", server.name, asyncio.run(long_streams(server, prompts)))
        if "overhead" in args.only and not args.without_ours:
            for _ in range(args.rounds):
                add("overhead", "optiq", overhead(model))
    print(json.dumps({**machine(), **versions(), "rounds": args.rounds}))
    for figure, samples in results.items():
        show(figure, samples)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
