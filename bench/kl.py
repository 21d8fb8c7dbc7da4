"""Streamed KL at a large vocabulary, against stock MLX with the BLAS it is given.

    python bench/kl.py [LIBRARY]

LIBRARY, such as Debian's /usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0, is
preloaded for stock MLX. The two run in processes of their own, in turn, and the best of the times
is printed, since other work on the machine can only add to them. Memory is the peak above what
the inputs take. The truth is float64 NumPy, at every 64th token.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

TOKENS, VOCABULARY, D = 512, 262_144, 640
RUNS = 3

WORK = f"""
import json, resource, sys, time
who = sys.argv[1]
if who == "optiq":
    import optiq
    from optiq import ops
import mlx.core as mx, numpy as np

keys = mx.random.split(mx.random.key(0), 3)
h_p = mx.random.normal(({TOKENS}, {D}), key=keys[0])
h_q = h_p + 0.1 * mx.random.normal(({TOKENS}, {D}), key=keys[1])
w = mx.random.normal(({VOCABULARY}, {D}), key=keys[2]) * (4 / {D}**0.5)
mx.eval(h_p, h_q, w)

def stock(h_p, w_p, h_q, w_q):
    p, q = h_p @ w_p.T, h_q @ w_q.T
    lse_p, lse_q = mx.logsumexp(p, axis=-1), mx.logsumexp(q, axis=-1)
    log_p, log_q = p - lse_p[..., None], q - lse_q[..., None]
    kl = mx.sum(mx.exp(log_p) * (log_p - log_q), axis=-1)
    return kl, mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1), lse_p, lse_q

run = ops.kl_divergence if who == "optiq" else stock
mx.eval(run(h_p[:2], w[:999], h_q[:2], w[:999]))

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

mx.clear_cache()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = resident()
seconds = []
for _ in range(2):
    start = time.perf_counter()
    out = run(h_p, w, h_q, w)
    mx.eval(out)
    seconds.append(time.perf_counter() - start)
memory = resident() - before

a, b = (np.array(h, dtype=np.float64)[::64] @ np.array(w, dtype=np.float64).T for h in (h_p, h_q))
def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
a, b = log_softmax(a), log_softmax(b)
truth = (np.exp(a) * (a - b)).sum(-1)
error = float(np.abs(np.array(out[0])[::64] - truth).max())
print(json.dumps({{"seconds": min(seconds), "mb": memory, "error": error}}))
"""


def run(who: str, library: str | None) -> dict[str, float]:
    """Best time, peak memory in MiB above the inputs, and the largest error of the KL in nats."""
    env = os.environ | ({"LD_PRELOAD": library} if library and who == "stock" else {})
    done = subprocess.run(
        [sys.executable, "-c", WORK, who], env=env, capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    library = sys.argv[1] if len(sys.argv) > 1 else None
    results: dict[str, list[dict[str, float]]] = {"optiq": [], "stock": []}
    for _ in range(RUNS):
        for who, runs in results.items():
            runs.append(run(who, library))
    print(
        f"{TOKENS} tokens, vocabulary {VOCABULARY}, d {D}; stock with {library or 'its own BLAS'}"
    )
    best = {who: min(r["seconds"] for r in runs) for who, runs in results.items()}
    for who, runs in results.items():
        memory, error = (max(r[key] for r in runs) for key in ("mb", "error"))
        print(f"{who}: {best[who]:.2f} s, {memory:.0f} MiB, KL off by at most {error:.1e} nats")
    print(f"{best['stock'] / best['optiq']:.1f} times faster")


if __name__ == "__main__":
    main()
