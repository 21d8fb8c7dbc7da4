"""A probe decodes off the quantized cache, and gives what the stock model gives token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_model

from optiq import ops
from optiq.formats import DENSE, Format
from optiq.kv import KVConfig, entries, make_cache
from optiq.quantize.kv.decoding import Decoder
from optiq.quantize.kv.slots import configured
from tests.architectures import construct
from tests.quantize.sensitivity.cases import randomized
from tests.tiny import KINDS, tiny_folder

TOKENS = [int(t) for t in np.random.default_rng(3).integers(4, 384, 48)]
TAIL = 16
K4 = Format("affine", 4, 32)


def rounded(x: mx.array, fmt: Format) -> mx.array:
    if fmt == DENSE:
        return x
    return ops.dequantize_kv(ops.quantize_kv(x, fmt), x.shape[-1], fmt, x.dtype)


def rounding(kind: type, k: Format, v: Format, start: int = 0) -> Any:
    """A stock cache class that rounds what is written to it from the position `start` on."""

    class Rounding(kind):  # type: ignore[misc]
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
            late = (mx.arange(keys.shape[2]) + self.offset >= start)[:, None]
            return super().update_and_fetch(
                mx.where(late, rounded(keys, k), keys), mx.where(late, rounded(values, v), values)
            )

    return Rounding


def model_of(tmp_path: Path, kind: str) -> nn.Module:
    if kind in KINDS:
        return load_model(tiny_folder(tmp_path, kind))[0]
    return randomized(lambda: construct(kind))


def stock_logits(model: nn.Module, caches: list[Any]) -> mx.array:
    """Logits [TAIL, vocabulary] of the tail, each token decoded alone."""
    model(mx.array([TOKENS[:-TAIL]]), cache=caches)
    return mx.concatenate([model(mx.array([[t]]), cache=caches)[0] for t in TOKENS[-TAIL:]])


def probed_logits(model: nn.Module, index: int, make: Callable[[], Any], step: int) -> mx.array:
    with Decoder(model) as decoder:
        context = decoder.read(TOKENS, TAIL, step=step)
        found = decoder.decode(context, index, make())
        logits = [
            decoder.logits(tape, hidden[0])
            for tape, hidden in zip(context.tail, found, strict=True)
        ]
    return mx.concatenate(logits)


@pytest.mark.parametrize("step", [TAIL, 5])
@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "qwen3_moe",
        "gemma3_text",
        "gemma4_text",
        "gpt_oss",
        "deepseek_v3",
        "qwen3_next",
        "lfm2",
    ],
)
def test_a_full_precision_probe_changes_nothing(tmp_path: Path, kind: str, step: int) -> None:
    model = model_of(tmp_path, kind)
    with Decoder(model) as decoder:
        context = decoder.read(TOKENS, TAIL, step=step)
        fresh = make_prompt_cache(model)
        assert list(decoder.owners) == list(range(len(fresh)))
        probed = [i for i, written in enumerate(context.written) if written]
        assert probed
        for i in probed:
            found = decoder.decode(context, i, fresh[i])
            for hidden, tape in zip(found, context.tail, strict=True):
                assert mx.allclose(hidden, tape.hidden, rtol=0, atol=2e-5), i


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_probe_is_decoding_with_that_cache_rounded(tmp_path: Path, kind: str) -> None:
    """The truth: stock caches, of which one rounds, after a prefill in full precision."""
    model = model_of(tmp_path, kind)
    plain = KVConfig(entries(model))
    for i, cache in enumerate(make_prompt_cache(model)):
        for side, (k, v) in {"k": (K4, DENSE), "v": (DENSE, K4)}.items():
            caches = make_prompt_cache(model)
            model(mx.array([TOKENS[:-TAIL]]), cache=caches)
            caches[i].__class__ = rounding(type(cache), k, v)
            caches[i].keys, caches[i].values = (
                rounded(caches[i].keys, k),
                rounded(caches[i].values, v),
            )
            expected = mx.concatenate(
                [model(mx.array([[t]]), cache=caches)[0] for t in TOKENS[-TAIL:]]
            )
            config = configured(plain, {f"{i}.{side}": K4})
            got = probed_logits(model, i, lambda c=config, i=i: make_cache(model, c)[i], TAIL)
            assert mx.allclose(got, expected, rtol=0, atol=1e-4)
            assert not mx.allclose(got, stock_logits(model, make_prompt_cache(model)), atol=1e-3)


def test_rounding_the_last_chunk_alone_changes_nothing_before_it(tmp_path: Path) -> None:
    """And rounding the context alone changes the tail, which reads it back."""
    model = model_of(tmp_path, "llama")
    plain = probed_logits(model, 0, KVCache, 4)
    late = len(TOKENS) - 4
    last = probed_logits(model, 0, rounding(KVCache, K4, K4, start=late), 4)
    assert mx.array_equal(last[:-4], plain[:-4])
    assert (mx.abs(last[-4:] - plain[-4:]).max(axis=1) > 1e-3).all()
    everything = probed_logits(model, 0, rounding(KVCache, K4, K4), 4)
    assert (mx.abs(everything - plain).max(axis=1) > 1e-3).all()


def test_the_model_is_its_own_again(tmp_path: Path) -> None:
    model = model_of(tmp_path, "gemma3_text")
    before = {path: id(m) for path, m in model.named_modules()}
    probed_logits(model, 0, lambda: RotatingKVCache(max_size=8), TAIL)
    assert {path: id(m) for path, m in model.named_modules()} == before
