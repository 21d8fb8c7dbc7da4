"""Caches found in the prefix cache go on as caches that read everything themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, make_prompt_cache

from optiq import kv
from optiq.errors import KVError
from optiq.kv.prefix import Key
from optiq.serve.engine.prefix import PrefixCache
from optiq.serve.engine.prefix.cache import LEAST, SPAN
from tests import architectures
from tests.kv.models import KINDS, model_of

KEY = Key("model", config="config")
PLENTY = 1 << 30
SLICES = (20, 9, 1, 1, 17, 3, 1)  # in which prompts are read here
ENDS = [sum(SLICES[: i + 1]) for i in range(len(SLICES))]
TOKENS = [(37 * i * i + 11 * i) % 380 + 2 for i in range(ENDS[-1])]
TAIL = [7, 300, 21, 5]


def model(kind: str) -> nn.Module:
    if kind == "mamba2":
        mx.random.seed(3)
        made = architectures.construct(kind)
        mx.eval(made.parameters())
        return made
    return model_of(kind)


def in_bits(model: nn.Module, exact: int) -> nn.Module:
    config = kv.KVConfig.uniform(kv.entries(model), "8/4")
    return kv.attach(model, replace(config, fp_recent=exact, fp_sink=exact))


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "plain": model,
    "8/4": lambda kind: in_bits(model(kind), 0),
    "8/4 and exact tokens": lambda kind: in_bits(model(kind), 3),
}
CASES = [(kind, bits) for kind in KINDS for bits in MODELS] + [("mamba2", "plain")]


def read(model: nn.Module, caches: list[Any], upto: int, keep: PrefixCache | None = None) -> None:
    begin = 0
    for end in ENDS:
        if end <= upto:
            mx.eval(model(mx.array([TOKENS[begin:end]]), cache=caches))
            if keep is not None:
                keep.keep(TOKENS[:end], caches)
            begin = end


def finish(model: nn.Module, caches: list[Any]) -> mx.array:
    """Logits of the tail, which is read a few at a time."""
    out = [model(mx.array([part]), cache=caches) for part in (TAIL[:2], TAIL[2:3], TAIL[3:])]
    joined = mx.concatenate(out, axis=1)
    mx.eval(joined)
    return joined


@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_a_hit_goes_on_as_a_cold_run(kind: str, bits: str) -> None:
    model = MODELS[bits](kind)
    prefix = PrefixCache(KEY, PLENTY)
    caches = make_prompt_cache(model)
    read(model, caches, ENDS[-1], prefix)
    went_on = finish(model, caches)  # the caller's caches are not changed by keeping them
    for end in ENDS:
        cold = make_prompt_cache(model)
        read(model, cold, end)
        expected = finish(model, cold)
        for _ in range(2):  # nor is what was kept changed by going on
            caches, n = prefix.find(TOKENS[:end] + TAIL, lambda: make_prompt_cache(model))
            assert n == end
            assert [type(c) for c in caches] == [type(c) for c in cold]
            assert mx.array_equal(finish(model, caches), expected)
    assert mx.array_equal(went_on, expected)


def test_whole_models_are_cut_anywhere() -> None:
    model = MODELS["8/4"]("mistral")
    prefix, held = PrefixCache(KEY, PLENTY), make_prompt_cache(model)
    read(model, held, ENDS[-1], prefix)
    for n in (LEAST, 30, 31, ENDS[-1] - 1):
        found, reused = prefix.find([*TOKENS[:n], 1], lambda: make_prompt_cache(model))
        assert reused == n
        for a, b in zip(found, held, strict=True):
            assert (a.offset, a.vectors, a.layout) == (n, b.vectors, b.layout)
            assert mx.array_equal(a.keys[:, :, :n], b.keys[:, :, :n])
            assert mx.array_equal(a.values[:, :, :n], b.values[:, :, :n])
    assert prefix.find(TOKENS, lambda: make_prompt_cache(model))[1] == len(TOKENS) - 1


def test_what_cannot_be_cut_is_found_where_it_was_kept() -> None:
    model = MODELS["8/4"]("gpt_oss")
    prefix = PrefixCache(KEY, PLENTY)
    read(model, make_prompt_cache(model), ENDS[-1], prefix)
    for n in range(len(TOKENS) + 1):
        found, reused = prefix.find(TOKENS[:n], lambda: make_prompt_cache(model))
        assert reused == max((end for end in ENDS if LEAST <= end < n), default=0)
        assert all(cache.offset == reused for cache in found)


def test_caches_of_another_length_are_refused() -> None:
    model = MODELS["plain"]("mistral")
    caches = make_prompt_cache(model)
    read(model, caches, 20)
    with pytest.raises(KVError, match="21 tokens, but caches of 20"):
        PrefixCache(KEY, PLENTY).keep(TOKENS[:21], caches)


# Against brute force: caches in which every row, and the state, tells all tokens up to it.

ROW = 2 * 2 * 3 * 4 + 4  # bytes: keys and values, 2 heads, 3 numbers each, and the token
STATE = 2 * 4

Kept = set[tuple[int, ...]]


def told(tokens: Sequence[int]) -> list[float]:
    """A number for each prefix, of the prefix alone."""
    numbers, h = [], 1
    for token in tokens:
        h = (h * 31 + token + 7) % 16_777_213  # exact in float32
        numbers.append(float(h))
    return numbers


def empty(recurrent: bool) -> list[Any]:
    return [CacheList(KVCache(), ArraysCache(1))] if recurrent else [KVCache()]


def caches_of(tokens: Sequence[int], recurrent: bool) -> list[Any]:
    caches = empty(recurrent)
    rows = caches[0][0] if recurrent else caches[0]
    if tokens:
        x = mx.broadcast_to(mx.array(told(tokens))[None, None, :, None], (1, 2, len(tokens), 3))
        rows.update_and_fetch(x, -x)
    if recurrent:
        caches[0][1][0] = mx.array([[told(tokens)[-1] if tokens else 0.0, float(len(tokens))]])
    return caches


def check(found: list[Any], tokens: Sequence[int], recurrent: bool) -> None:
    rows = found[0][0] if recurrent else found[0]
    assert rows.offset == len(tokens)
    if tokens:
        keys, values = rows.keys_and_values()
        assert keys[0, 1, :, 2].tolist() == told(tokens)
        assert values[0, 0, :, 0].tolist() == [-x for x in told(tokens)]
        if recurrent:
            assert found[0][1][0].tolist() == [[told(tokens)[-1], len(tokens)]]


def longest(kept: Kept, tokens: tuple[int, ...], recurrent: bool) -> int:
    known = kept if recurrent else {t[:n] for t in kept for n in range(len(t) + 1)}
    n = max((n for n in range(len(tokens)) if tokens[:n] in known), default=0)
    return n if n >= LEAST else 0


def size(kept: Kept, recurrent: bool) -> int:
    rows = {t[: n + 1] for t in kept for n in range(len(t))}
    return ROW * len(rows) + STATE * len(kept) * recurrent


def sequences() -> st.SearchStrategy[tuple[int, ...]]:
    """Some that begin the same; blocks of 256 tokens come to several."""
    stem = st.integers(0, 2).map(lambda i: (i,) * LEAST)
    long = st.sampled_from([(), (1,) * 230, (1,) * 300, (1, 2) * 260])
    return st.tuples(stem, long, st.lists(st.integers(0, 1), max_size=5)).map(
        lambda parts: (*parts[0], *parts[1], *parts[2])
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), sequences()), max_size=12), st.booleans())
def test_it_finds_the_longest_prefix_and_counts_each_byte_once(
    steps: list[tuple[bool, tuple[int, ...]]], recurrent: bool
) -> None:
    prefix, kept = PrefixCache(KEY, PLENTY), Kept()
    for keep, tokens in steps:
        if keep:
            prefix.keep(tokens, caches_of(tokens, recurrent))
            kept.add(tokens)
        found, n = prefix.find(tokens, lambda: empty(recurrent))
        assert n == longest(kept, tokens, recurrent)
        check(found, tokens[:n], recurrent)
        assert prefix.nbytes == size(kept, recurrent)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), sequences()), max_size=16),
    st.booleans(),
    st.integers(0, 2000 * ROW),
)
def test_a_budget_is_never_passed(
    steps: list[tuple[bool, tuple[int, ...]]], recurrent: bool, budget: int
) -> None:
    prefix, kept = PrefixCache(KEY, budget), Kept()
    for keep, tokens in steps:
        if keep:
            prefix.keep(tokens, caches_of(tokens, recurrent))
            kept.add(tokens)
            assert prefix.nbytes <= budget
        found, n = prefix.find(tokens, lambda: empty(recurrent))
        assert n <= longest(kept, tokens, recurrent)
        check(found, tokens[:n], recurrent)
        # What was used last is there; the rest of blocks that it leaves halfway may be, too.
        if keep and size({tokens}, recurrent) + 3 * SPAN * ROW <= budget:
            assert n >= longest({tokens}, tokens, recurrent)


def test_the_least_recently_used_goes_first() -> None:
    a, b, c = ((i,) * 100 for i in range(3))
    prefix = PrefixCache(KEY, 250 * ROW)
    for tokens in (a, b):
        prefix.keep(tokens, caches_of(tokens, False))
    assert prefix.find(a, lambda: empty(False))[1] == 99
    prefix.keep(c, caches_of(c, False))
    there = [prefix.find(tokens, lambda: empty(False))[1] for tokens in (a, b, c)]
    assert there == [99, 0, 99]
    assert (prefix.nbytes, prefix.entries) == (200 * ROW, 2)


def test_memory_is_given_back() -> None:
    prefix = PrefixCache(KEY, 10_000_000)
    x = mx.zeros((1, 1, 40_000, 256))
    mx.eval(x)
    before = mx.get_active_memory()
    for i in range(8):  # 2.5 MB each, of caches 16 times as large
        cache = KVCache()
        cache.state = (x + i, x - i, 1200)
        prefix.keep([i] * 1200, [cache])
    del cache
    assert prefix.nbytes <= 10_000_000
    assert mx.get_active_memory() - before <= 1.01 * prefix.nbytes + 100_000
