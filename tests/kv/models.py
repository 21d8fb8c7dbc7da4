"""Tiny models of many kinds of attention, and what generating with them takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from optiq import kv, ops
from optiq.formats import DENSE, Format
from optiq.kv.model import WithCache
from tests import architectures

# Full and sliding with sinks, latent, sliding with shared layers, recurrent beside full, plain.
CHANGES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"sliding_window": 8},
    "deepseek_v3": {},
    "gemma4_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "enable_moe_block": False,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3_next": {},
    "mistral": {},
    "gpt2": {},
}  # fmt: skip
KINDS = tuple(CHANGES)


def model_of(kind: str) -> nn.Module:
    mx.random.seed(3)
    model = architectures.construct(kind, **CHANGES[kind])
    mx.eval(model.parameters())
    return model


def prompts(*lengths: int) -> list[list[int]]:
    return [
        [(37 * i + 11 * j + 5 * i * j) % 380 + 2 for j in range(n)] for i, n in enumerate(lengths)
    ]


def batched(
    model: nn.Module, first: list[list[int]], late: Sequence[list[int]] = (), tokens: int = 7
) -> list[list[int]]:
    """Greedy tokens of all prompts; `late` ones join, and the second prompt stops early."""
    generator = BatchGenerator(
        model, max_tokens=tokens, completion_batch_size=8, prefill_batch_size=4, prefill_step_size=8
    )
    limits = [tokens - 4 if i == 1 else tokens for i in range(len(first))]
    uids = generator.insert(first, max_tokens=limits)
    got: dict[int, list[int]] = {uid: [] for uid in uids}
    waiting = list(late)
    while responses := generator.next_generated():
        for response in responses:
            got[response.uid].append(response.token)
        if waiting and len(got[uids[0]]) == 2:
            more = generator.insert(waiting)
            uids, waiting = [*uids, *more], []
            got |= {uid: [] for uid in more}
    generator.close()
    return [got[uid] for uid in uids]


def logits(
    model: nn.Module, caches: list[Any], steps: Sequence[int] = (13, 1, 1, 5, 1)
) -> mx.array:
    """Of all tokens, read a few at a time."""
    ids, out, at = prompts(sum(steps))[0], [], 0
    for n in steps:
        out.append(model(mx.array([ids[at : at + n]]), cache=caches))
        at += n
    joined = mx.concatenate(out, axis=1)
    mx.eval(joined)
    return joined


def rounding_caches(model: nn.Module, config: kv.KVConfig) -> list[Any]:
    """Stock caches that are given what the records of `config` stand for."""
    caches = model.stock_caches() if isinstance(model, WithCache) else make_prompt_cache(model)
    for cache, entry in zip(caches, config.entries, strict=True):
        if entry.quantized:
            cache.__class__ = _Rounding if type(cache) is KVCache else _RotatingRounding
            cache.formats = (entry.k, entry.v)
    return caches


def _round(x: mx.array, fmt: Format) -> mx.array:
    if fmt == DENSE:
        return x
    return ops.dequantize_kv(ops.quantize_kv(x, fmt), x.shape[-1], fmt, x.dtype)


class _Rounding(KVCache):  # type: ignore[misc]
    formats: tuple[Format, Format]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        k, v = self.formats
        return super().update_and_fetch(_round(keys, k), _round(values, v))


class _RotatingRounding(RotatingKVCache):  # type: ignore[misc]
    formats: tuple[Format, Format]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        k, v = self.formats
        return super().update_and_fetch(_round(keys, k), _round(values, v))
