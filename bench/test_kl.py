"""KL from hidden states and heads, against the same in `mx.*` with all logits stored.

In this run stock multiplies with optiq's sgemm. `python bench/kl.py` compares with another BLAS,
each in a process of its own, at a large vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

from optiq import ops
from optiq.ops import AffineWeight, Comparison

# tokens, vocabulary, d, bits of the candidate's head
CASES = [(512, 49_152, 576, 0), (64, 49_152, 576, 0), (512, 49_152, 576, 4), (8, 49_152, 576, 4)]


def stored(h_p: mx.array, w_p: mx.array, h_q: mx.array, w_q: ops.kl.Head) -> Comparison:
    """What one writes with stock MLX."""
    p = h_p @ w_p.T
    if isinstance(w_q, AffineWeight):
        q = mx.quantized_matmul(h_q, *w_q[:3], group_size=w_q.group_size, bits=w_q.bits)
    else:
        q = h_q @ w_q.T
    lse_p, lse_q = mx.logsumexp(p, axis=-1), mx.logsumexp(q, axis=-1)
    log_p, log_q = p - lse_p[..., None], q - lse_q[..., None]
    kl = mx.sum(mx.exp(log_p) * (log_p - log_q), axis=-1)
    return Comparison(kl, mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1), lse_p, lse_q)


@pytest.mark.parametrize("who", ["optiq", "stock"])
@pytest.mark.parametrize(("tokens", "vocabulary", "d", "bits"), CASES)
def test_kl(benchmark, record, tokens, vocabulary, d, bits, who) -> None:  # type: ignore[no-untyped-def]
    keys = mx.random.split(mx.random.key(0), 3)
    h_p = mx.random.normal((tokens, d), key=keys[0])
    h_q = h_p + 0.1 * mx.random.normal((tokens, d), key=keys[1])
    w_p = mx.random.normal((vocabulary, d), key=keys[2]) * (4 / d**0.5)
    w_q = AffineWeight(*mx.quantize(w_p, 64, bits), 64, bits) if bits else w_p
    mx.eval(h_p, h_q, w_p, *(w_q[:3] if bits else []))
    run = ops.kl_divergence if who == "optiq" else stored
    benchmark.pedantic(
        lambda: mx.eval(run(h_p, w_p, h_q, w_q)), rounds=5 if who == "optiq" else 2, warmup_rounds=1
    )
    record(f"kl-{tokens}x{vocabulary}x{d}-{bits or 'dense'}", who)
