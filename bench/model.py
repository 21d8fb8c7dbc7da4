"""Prefill and decode of a whole model: as optiq loads it, llama.cpp, and stock mlx-lm.

    python bench/model.py MODEL [--llama LLAMA_BENCH GGUF] [--stock] [--busy] [--rounds N]

Each program runs in a process of its own, one after the other in each round; the ratios are those
within a round, with quartiles. LLAMA_BENCH is the program of that name in llama.cpp; GGUF should
have the bytes of MODEL. A prompt is read as generators read it, and as LLAMA_BENCH does: logits are
made for its last token only. --busy keeps another process busy on the first processor. --stock
reads a prompt of 16 tokens and writes 8: on x86 it takes a second for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

PROMPTS = 128, 512
DECODE = 64

WORK = """
import json, sys, time
who, path, prompts, decode = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
if who == "optiq":
    import optiq
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
if who == "optiq":
    from optiq.kv.rows import joined
    model = optiq.load(path)[0]
    as_one = lambda caches: joined([caches], settled=True)
else:
    import mlx_lm
    model, as_one = mlx_lm.load(path)[0], lambda caches: caches

def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

def read(n):
    caches = make_prompt_cache(model)
    if n > 1:
        model(mx.array([list(range(1000, 999 + n))]), cache=caches)
        mx.eval([c.state for c in caches])
    mx.eval(model(mx.array([[999 + n]]), cache=as_one(caches)))
    return caches

read(8)
found = {f"prefill {n}": n / seconds(lambda: read(n)) for n in prompts}
caches = as_one(read(8))
def write(n):
    for i in range(n):
        mx.eval(model(mx.array([[1000 + i]]), cache=caches))
write(4)
found["decode"] = decode / seconds(lambda: write(decode))
print(json.dumps(found))
"""


def run(who: str, path: str) -> dict[str, float]:
    """Tokens per second of one process."""
    prompts, decode = ((16,), 8) if who == "stock" else (PROMPTS, DECODE)
    command = [sys.executable, "-c", WORK, who, path, json.dumps(prompts), str(decode)]
    env = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_llama(program: str, gguf: str) -> dict[str, float]:
    """Tokens per second of llama.cpp, in as many threads as there are processors."""
    prompts = ",".join(map(str, PROMPTS))
    command = [program, "-m", gguf, "-p", prompts, "-n", str(DECODE), "-r", "1", "-o", "json"]
    command += ["-t", str(len(os.sched_getaffinity(0)))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        f"prefill {r['n_prompt']}" if r["n_prompt"] else "decode": r["avg_ts"]
        for r in json.loads(done.stdout)
    }


@contextmanager
def busy() -> Iterator[None]:
    """Another process, which does nothing but work."""
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(spin.pid, {min(os.sched_getaffinity(0))})
    try:
        yield
    finally:
        spin.kill()
        spin.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--llama", nargs=2, metavar=("LLAMA_BENCH", "GGUF"))
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    programs: dict[str, Callable[[], dict[str, float]]] = {
        "optiq": lambda: run("optiq", args.model)
    }
    if args.llama:
        programs["llama.cpp"] = lambda: run_llama(*args.llama)
    if args.stock:
        programs["stock"] = lambda: run("stock", args.model)
    if args.busy:

        def beside() -> dict[str, float]:
            with busy():
                return run("optiq", args.model)

        programs["beside a busy process"] = beside
    rounds = [{who: work() for who, work in programs.items()} for _ in range(args.rounds)]
    for job in rounds[0]["optiq"]:
        for who in programs:
            speeds = [r[who][job] for r in rounds if job in r[who]]
            if not speeds:
                continue
            ratios = [r["optiq"][job] / r[who][job] for r in rounds]
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            print(
                f"{job}, {who}: {np.median(speeds):.1f} tokens/s, "
                f"optiq {middle:.2f} times [{low:.2f}, {high:.2f}]"
            )


if __name__ == "__main__":
    main()
