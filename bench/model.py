"""Prefill and decode speed of a whole model, against stock mlx-lm on the same machine.

    python bench/model.py MODEL_FOLDER

Each of the two runs in a process of its own, in turn, five times; medians are printed. Stock
means mlx-lm with MLX as its wheel is: the model's own dtypes, the wheel's BLAS.
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
nn.quantize(model, 64, 4)
model = ready(model)
cache = make_prompt_cache(model)
mx.eval(model(tokens[:, :16], cache=cache))
def decode():
    for i in range({DECODE}):
        mx.eval(model(tokens[:, i : i + 1], cache=cache))
print(json.dumps({{"prefill": prefill, "decode": {DECODE} / seconds(lambda: decode() or [])}}))
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


def main() -> None:
    path = sys.argv[1]
    runs: dict[str, list[dict[str, float]]] = {"optiq": [], "stock": []}
    for _ in range(RUNS):
        for who, results in runs.items():
            results.append(run(who, path))
    for job, what in (("prefill", f"{PREFILL} tokens, 16-bit weights"), ("decode", "4-bit")):
        speed = {who: median(r[job] for r in results) for who, results in runs.items()}
        spread = {
            who: f"{min(r[job] for r in results):.1f}-{max(r[job] for r in results):.1f}"
            for who, results in runs.items()
        }
        print(
            f"{job} ({what}): optiq {speed['optiq']:.1f} tokens/s ({spread['optiq']}), "
            f"stock {speed['stock']:.1f} ({spread['stock']}), "
            f"{speed['optiq'] / speed['stock']:.1f} times"
        )


if __name__ == "__main__":
    main()
