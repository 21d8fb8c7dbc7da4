"""A server of two ranks with one thread each, against one of one thread, on this machine.

    python -m bench.ranks 1.5b [--folder DIR] [--tokens 64] [--rounds 5] [--streams 1]

The shape is one of bench.memory, its random weights in 4 bits (groups of 64); the model is written
to DIR, by default a temporary folder, and used again if it lies there. Both servers run from the
start to the end; one that is not asked takes no time. In each round each answers the same prompt
with the same seed. Decoding is an answer without the time of its first token. Medians over the
rounds, the median of the ratios with the lowest and the highest, and whether the answers are the
same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from mlx_lm.utils import load_model, quantize_model, save_model

from bench.memory import SHAPES, write
from tests.ports import hostfile
from tests.tiny import EOS, write_tokenizer

START = 300  # seconds for a server to be ready
SERVE = "import sys; from optiq.cli import main; sys.exit(main())"
ALIKE = 1e-2  # of log-probabilities; those of other tokens differ by far more
PROMPT = "the river turned silver and the two brothers stopped to look at it"


def quantized(folder: Path, shape: str) -> Path:
    """The model of this shape in `folder`, made if it is not there."""
    out = folder / f"{shape}-4bit"
    if not (out / "config.json").exists():
        with tempfile.TemporaryDirectory(dir=folder) as original:
            model, config = load_model(write(Path(original), SHAPES[shape]), lazy=True)
            model, config = quantize_model(model, config, group_size=64, bits=4)
            save_model(out, model)
        write_tokenizer(out)
        (out / "config.json").write_text(json.dumps(config))
    return out


@contextmanager
def served(model: Path, ranks: int) -> Iterator[str]:
    """The address of a server of so many ranks with one thread each."""
    command = [sys.executable, "-c", SERVE, "serve", str(model), "--port", "0", "--json"]
    shared = {**os.environ, "OPTIQ_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        if ranks > 1:
            shared["MLX_HOSTFILE"] = str(hostfile(Path(folder), ranks))
        own = [{"MLX_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
        processes = [
            subprocess.Popen(command, env=shared | each, stdout=subprocess.PIPE) for each in own
        ]
        try:
            assert processes[0].stdout is not None
            yield json.loads(processes[0].stdout.readline())["url"]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(60)


def ask(url: str, tokens: int) -> tuple[list[float], float]:
    """The log-probability of each token, and the seconds that the answer took.

    Tokens are drawn with a seed, as an answer that repeats itself would be guessed. Most of them
    have no text in the tests' tokenizer, so a stream would not show when they came.
    """
    body = {
        "prompt": PROMPT, "max_tokens": tokens, "seed": 0, "logprobs": 0,
        "logit_bias": {str(EOS): -100},
    }  # fmt: skip
    began = time.perf_counter()
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=START)
    seconds = time.perf_counter() - began
    logprobs: list[float] = reply.raise_for_status().json()["choices"][0]["logprobs"][
        "token_logprobs"
    ]
    assert len(logprobs) == tokens
    return logprobs, seconds


def asked(url: str, tokens: int, streams: int) -> tuple[list[float], float]:
    """The log-probabilities of one answer, and the tokens a second of all, after the first."""
    with ThreadPoolExecutor(streams) as pool:
        first = [seconds for _, seconds in pool.map(lambda _: ask(url, 1), range(streams))]
        answers = list(pool.map(lambda _: ask(url, tokens), range(streams)))
    taken = statistics.mean(seconds for _, seconds in answers) - statistics.mean(first)
    return answers[0][0], streams * (tokens - 1) / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path, help="where the model is kept")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=1, help="answers at a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = quantized(args.folder or Path(temporary), args.shape)
        with served(model, 1) as one, served(model, 2) as two:
            rates: dict[str, list[float]] = {one: [], two: []}
            found: dict[str, list[float]] = {}
            for url in (one, two):
                ask(url, 4)
            for n in range(args.rounds):
                for url in (one, two) if n % 2 else (two, one):
                    found[url], rate = asked(url, args.tokens, args.streams)
                    rates[url].append(rate)
    ratios = sorted(b / a for a, b in zip(rates[one], rates[two], strict=True))
    for name, url in (("one rank ", one), ("two ranks", two)):
        print(f"{args.shape}, {name}: {statistics.median(rates[url]):.2f} tokens/s")
    same = all(abs(a - b) < ALIKE for a, b in zip(found[one], found[two], strict=True))
    print(
        f"two against one: {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}], "
        f"answers {'the same' if same else 'NOT the same'}"
    )


if __name__ == "__main__":
    main()
