"""A training step against stock mlx-lm's, on the same base, adapter and batches.

    python -m bench.lora_step MODEL [--tokens 32] [--steps 8] [--rank 8]

Each program runs in a process of its own: stock is mlx-lm's layers, MLX's cross entropy and AdamW,
with MLX as its wheel is. Neither runs blocks again on the way back, as is mlx-lm's default. Stock
computes in the model's own 16 bits, and in float32, where losses are compared. Printed are seconds
of a step (the fastest, which other work on the machine disturbs least; and what processors spent,
waiting threads included), losses, and their largest difference. Stock trains on about a token a
second in 16 bits, so batches are small, and in 16 bits it takes three steps at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

COMMON = """
import json, sys, time
who, path, tokens, steps, rank = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
if who == "optiq":
    import optiq
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optimizers, numpy as np
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
rng = np.random.default_rng(0)
batches = [[int(t) for t in rng.integers(1000, 40000, tokens)] for _ in range(steps)]
times, losses = [], []
"""

STOCK = """
model = load(path)[0]
if who == "stock-float32":
    model.set_dtype(mx.float32)
model.freeze()
linear_to_lora_layers(model, len(model.layers), {"rank": rank, "scale": 2.0, "dropout": 0.0})
for i, (name, a) in enumerate(sorted(tree_flatten(model.trainable_parameters()))):
    if name.endswith("lora_a"):
        bound = a.shape[0] ** -0.5
        value = mx.random.uniform(-bound, bound, a.shape, key=mx.random.key(i))
        model.load_weights([(name, value)], strict=False)
adam = optimizers.AdamW(1e-3, bias_correction=True, weight_decay=0.0)
def loss(model, ids):
    return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()
step = nn.value_and_grad(model, loss)
for batch in batches:
    began = time.perf_counter(), time.process_time()
    value, gradients = step(model, mx.array([batch]))
    adam.update(model, gradients)
    mx.eval(value, model.trainable_parameters(), adam.state)
    times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    losses.append(value.item())
print(json.dumps([times, losses]))
"""

OURS = """
from optiq.lora.data import Sample
from optiq.lora.layers import LowRank
from optiq.lora.options import Training
from optiq.lora.packing import Pack
from optiq.lora.state import State, as_vector
from optiq.lora.tuned import Tuned
from optiq.lora import start, state as states
from optiq.nn.accelerate import accelerate
from optiq.sources import resolve, load as open_model
model = open_model(resolve(path), allow_quantized=True).model
accelerate(model, blocks=False)
modules = start.chosen(model, "all")
names = sorted(f"{m.path}.{x}" for m in modules for x in ("lora_a", "lora_b"))
terms = {}
for m in modules:
    out, width = m.shape
    key = mx.random.key(names.index(f"{m.path}.lora_a"))
    a = mx.random.uniform(-(width**-0.5), width**-0.5, (width, rank), key=key)
    terms[m.path] = LowRank(a, mx.zeros((rank, out)))
tuned = Tuned(model, terms, 2.0, recompute=False)
options = Training(iters=10**6, warmup=0, learning_rate=1e-3, clip=1e9, weight_decay=0.0)
state = State(options, tuned.parameters())
with tuned:
    for batch in batches:
        packed = Pack((Sample(tuple(batch), tuple(range(1, tokens)), 1),))
        began = time.perf_counter(), time.process_time()
        value, gradients = tuned.loss_and_gradients(state.parameters, lambda: tuned.summed(packed))
        n = tokens - 1
        state.update(value / n, as_vector(gradients) / n, tokens)
        times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        losses.append(value / n)
print(json.dumps([times, losses]))
"""


def run(who: str, arguments: list[str]) -> tuple[list[list[float]], list[float]]:
    """Seconds of each step, by the clock and of all processors, and the losses."""
    code = COMMON + (OURS if who == "optiq" else STOCK)
    done = subprocess.run(
        [sys.executable, "-c", code, who, *arguments],
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    times, losses = json.loads(done.stdout.splitlines()[-1])
    return times, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    for name, default in (("--tokens", 32), ("--steps", 8), ("--rank", 8)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    found: dict[str, tuple[float, list[float]]] = {}
    for who in ("optiq", "stock-float32", "stock"):
        steps = min(args.steps, 3) if who == "stock" else args.steps
        times, losses = run(who, [args.model, *map(str, (args.tokens, steps, args.rank))])
        wall, processors = (min(of_all) for of_all in zip(*times, strict=True))
        found[who] = wall, losses
        shown = ", ".join(f"{loss:.5f}" for loss in losses[:3])
        print(
            f"{who}: {wall:.2f} s a step, {processors:.2f} s of processors, losses {shown}",
            flush=True,
        )
        if who != "optiq":
            ratio = wall / found["optiq"][0]
            differences = [abs(a - b) for a, b in zip(found["optiq"][1], losses, strict=False)]
            print(f"  optiq is {ratio:.0f} times as fast, losses within {max(differences):.1e}")


if __name__ == "__main__":
    main()
