"""Prefill and decode speed of a whole model: stock mlx-lm, and llama.cpp if it is given.

    python bench/model.py MODEL_FOLDER [LLAMA_BENCH GGUF]

Each program runs in a process of its own, in turn, five times; medians are printed. Stock means
mlx-lm with MLX as its wheel is: the model's own dtypes, the wheel's BLAS. LLAMA_BENCH is the
program of that name in llama.cpp; GGUF should be of the same size as the 4-bit model. Stock reads
a 4-bit prompt of 16 tokens only, at some two tokens a second whatever the length.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median

RUNS = 5
PREFILL = 128  # tokens
DECODE = 24  # tokens

WORK = f"""
import sys, time, json
who, path = sys.argv[1:]
if who == "optiq":
    import optiq
import mlx.core as mx, mlx.nn as nn
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

def seconds(work):
    start = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - start

def ready(model):
    if who == "optiq":
        optiq.accelerate(model)
    mx.eval(model(mx.array([[1, 2, 3]])))
    return model

tokens = mx.array([list(range(1000, {1000 + PREFILL}))])
model = ready(load(path)[0])
prefill = {PREFILL} / seconds(lambda: model(tokens))
model = load(path)[0]
prompt = {PREFILL} if who == "optiq" else 16
nn.quantize(model, 64, 4)
model = ready(model)
prefill4 = prompt / seconds(lambda: model(tokens[:, :prompt]))
cache = make_prompt_cache(model)
mx.eval(model(tokens[:, :16], cache=cache))
def decode():
    for i in range({DECODE}):
        mx.eval(model(tokens[:, i : i + 1], cache=cache))
print(json.dumps({{"prefill": prefill, "prefill4": prefill4,
                  "decode": {DECODE} / seconds(lambda: decode() or [])}}))
"""


def run(who: str, path: str) -> dict[str, float]:
    """Tokens per second of one process."""
    done = subprocess.run(
        [sys.executable, "-c", WORK, who, path],
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_llama(program: str, gguf: str) -> dict[str, float]:
    """Tokens per second of llama.cpp, in as many threads as there are processors."""
    command = [program, "-m", gguf, "-p", str(PREFILL), "-n", str(DECODE), "-r", "1", "-o", "json"]
    command += ["-t", str(len(os.sched_getaffinity(0)))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    prompt, generation = json.loads(done.stdout)
    return {"prefill4": prompt["avg_ts"], "decode": generation["avg_ts"]}


def main() -> None:
    path, *llama = sys.argv[1:]
    programs = {"optiq": lambda: run("optiq", path), "stock": lambda: run("stock", path)}
    if llama:
        programs["llama.cpp"] = lambda: run_llama(*llama)
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in programs}
    for _ in range(RUNS):
        for who, work in programs.items():
            runs[who].append(work())
    jobs = {
        "prefill": f"prefill, {PREFILL} tokens, 16-bit weights",
        "prefill4": f"prefill, {PREFILL} tokens, 4-bit weights",
        "decode": "decode, 4-bit weights",
    }
    for job, name in jobs.items():
        print(name)
        ours = median(r[job] for r in runs["optiq"])
        for who, results in runs.items():
            speeds = sorted(r[job] for r in results if job in r)
            if speeds:
                middle = median(speeds)
                spread = f"({speeds[0]:.1f}-{speeds[-1]:.1f})"
                print(f"  {who}: {middle:.1f} tokens/s {spread}, optiq {ours / middle:.2f} times")


if __name__ == "__main__":
    main()
