"""The caches against brute force: rows of tokens as Python lists, each vector rounded by itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from optiq import ops
from optiq.errors import KVError
from optiq.formats import DENSE, Format
from optiq.kv.caches import records
from optiq.kv.records import Layout

HEADS, K_DIM, V_DIM = 2, 16, 24
F3, F4, F8 = (Format("affine", bits, 32) for bits in (3, 4, 8))
PAIRS = ((F8, F4), (DENSE, F4), (F3, DENSE), (F4, F8))


class Vectors:
    """A stream of new keys and values, never the same twice."""

    def __init__(self, dtype: mx.Dtype = mx.float32) -> None:
        self.count, self.dtype = 0, dtype

    def __call__(self, rows: int, n: int) -> tuple[mx.array, mx.array]:
        self.count += 1
        k, v = (
            mx.random.normal((rows, HEADS, n, dim), key=mx.random.key(97 * self.count + dim))
            for dim in (K_DIM, V_DIM)
        )
        return k.astype(self.dtype), v.astype(self.dtype)


def rounded(x: mx.array, fmt: Format) -> mx.array:
    if fmt == DENSE:
        return x
    return ops.dequantize_kv(ops.quantize_kv(x, fmt), x.shape[-1], fmt, x.dtype)


@dataclass
class Row:
    """The truth: per token the exact and the rounded vectors, and whether the exact are kept."""

    layout: Layout
    exact: list[Any] = field(default_factory=list)
    stored: list[Any] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)

    def write(self, k: mx.array, v: mx.array) -> None:
        """Of this row, `[heads, n, dim]`."""
        if not k.shape[1]:
            return
        layout = self.layout
        pairs = (k, rounded(k, layout.k)), (v, rounded(v, layout.v))
        for i in range(k.shape[1]):
            self.exact.append([np.array(x[:, i].astype(mx.float32)) for x, _ in pairs])
            self.stored.append([np.array(x[:, i].astype(mx.float32)) for _, x in pairs])
            self.kept.append(True)
        for i in range(max(0, len(self.kept) - layout.recent)):
            self.kept[i] = False

    def trim(self, n: int) -> None:
        for part in (self.exact, self.stored, self.kept):
            del part[len(part) - n :]

    def read(self, which: int) -> np.ndarray:
        chosen = [
            (self.exact if kept or i < self.layout.sink else self.stored)[i][which]
            for i, kept in enumerate(self.kept)
        ]
        return np.stack(chosen, axis=1)


def check(cache: Any, rows: list[Row], behind: list[int] | None = None) -> None:
    """What `cache` hands out is what `rows` say, on the bit."""
    if not any(row.exact for row in rows):
        return
    for which, plain in enumerate(cache.keys_and_values()):
        plain = np.array(plain)
        assert plain.shape[0] == len(rows)
        for i, row in enumerate(rows):
            if not row.exact:
                continue
            end = plain.shape[2] - (behind[i] if behind else 0)
            got = plain[i, :, end - len(row.exact) : end]
            np.testing.assert_array_equal(got, row.read(which))


class Machine:
    """Batches and single sequences, and the truth beside them."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.new = layout, Vectors()

    def single(self, *lengths: int) -> tuple[Any, list[Row]]:
        cache, row = records(KVCache(), self.layout), Row(self.layout)
        for n in lengths:
            self.write(cache, [row], n)
        return cache, [row]

    def write(self, cache: Any, rows: list[Row], n: int) -> None:
        k, v = self.new(len(rows), n)
        cache.update_and_fetch(k, v)
        for i, row in enumerate(rows):
            row.write(k[i], v[i])

    def prompt(self, cache: Any, rows: list[Row], lengths: list[int], step: int) -> None:
        """Prompts of unequal length, padded on the right, `step` tokens at a time."""
        longest = max(lengths)
        padding = [longest - n for n in lengths]
        if max(padding):
            cache.prepare(lengths=lengths, right_padding=padding)
        for start in range(0, longest, step):
            n = min(step, longest - start)
            k, v = self.new(len(rows), n)
            cache.update_and_fetch(k, v)
            behind = []
            for i, row in enumerate(rows):
                real = min(max(lengths[i] - start, 0), n)
                row.write(k[i, :, :real], v[i, :, :real])
                behind.append(max(0, start + n - lengths[i]))
            check(cache, rows, behind)
        if max(padding):
            cache.finalize()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_order_of_operations(data: Any) -> None:
    draw = data.draw
    k, v = draw(st.sampled_from(PAIRS))
    layout = Layout(k, v, draw(st.integers(0, 4)), draw(st.integers(0, 6)))
    machine, few = Machine(layout), st.integers(1, 7)

    def batch() -> tuple[Any, list[Row]]:
        lengths = draw(st.lists(st.lists(few, max_size=2), min_size=1, max_size=3))
        parts = [machine.single(*each) for each in lengths]
        caches = [cache for cache, _ in parts]
        return caches[0].merge(caches), [row for _, rows in parts for row in rows]

    cache, rows = batch()
    for _ in range(draw(st.integers(1, 5))):
        what = draw(st.sampled_from(("write", "prompt", "filter", "extend", "extract", "trim")))
        if what == "write":
            machine.write(cache, rows, draw(few))
        elif what == "prompt":
            machine.prompt(cache, rows, [draw(few) for _ in rows], draw(few))
        elif what == "filter":
            keep = sorted(draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
            cache.filter(keep)
            rows = [rows[i] for i in keep]
        elif what == "extend":
            other, more = batch()
            cache.extend(other)
            rows += more
        elif what == "extract" and cache.keys is not None:
            i = draw(st.integers(0, len(rows) - 1))
            if rows[i].exact:
                single, row = cache.extract(i), [copy.deepcopy(rows[i])]
                check(single, row)
                machine.write(single, row, draw(few))
                check(single, row)
        elif what == "trim" and (shortest := min(len(row.exact) for row in rows)) > 1:
            n = draw(st.integers(1, shortest - 1))
            assert cache.trim(n) == n
            for row in rows:
                row.trim(n)
        check(cache, rows)


def test_single_sequences_grow_and_are_trimmed() -> None:
    machine = Machine(Layout(F4, F3, sink=2, recent=5))
    cache, rows = machine.single(300, 1, 1)  # past the first block of 256
    check(cache, rows)
    for trimmed, written in ((1, 1), (4, 2), (290, 1), (3, 600), (598, 3), (13, 4)):
        cache.trim(trimmed)
        rows[0].trim(trimmed)
        check(cache, rows)
        machine.write(cache, rows, written)
        check(cache, rows)


def like_stock(cache: Any, stock: Any, layout: Layout, steps: list[int], rows: int = 1) -> None:
    """What `cache` reads is what a stock cache reads that was given rounded vectors."""
    new = Vectors()
    for n in steps:
        k, v = new(rows, n)
        got = cache.update_and_fetch(k, v)
        expected = stock.update_and_fetch(rounded(k, layout.k), rounded(v, layout.v))
        for a, b in zip(got, expected, strict=True):
            assert mx.array_equal(a, b)
        for a, b in zip(cache.keys_and_values(), expected, strict=True):
            assert mx.array_equal(a, b)
        masks = [c.make_mask(1) for c in (cache, stock)]
        assert (masks[0] is None) == (masks[1] is None)
        assert masks[0] is None or mx.array_equal(*masks)


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("keep", [0, 2])
def test_windows_turn_over_as_stock_ones_do(formats: tuple[Format, Format], keep: int) -> None:
    layout = Layout(*formats)
    steps = [5, 1, 1, 1, 1, 1, 4, 1, 1, 13, *[1] * 11, 3]
    like_stock(records(RotatingKVCache(8, keep), layout), RotatingKVCache(8, keep), layout, steps)


@pytest.mark.parametrize("formats", PAIRS)
def test_batches_of_windows_do_as_stock_ones_do(formats: tuple[Format, Format]) -> None:
    layout, new = Layout(*formats), Vectors()
    ours, stock = [], []
    for length in (3, 0, 11):
        mine, its = records(RotatingKVCache(8), layout), RotatingKVCache(8)
        if length:
            k, v = new(1, length)
            mine.update_and_fetch(k, v)
            its.update_and_fetch(rounded(k, layout.k), rounded(v, layout.v))
        ours.append(mine)
        stock.append(its)
    cache, its = ours[0].merge(ours), BatchRotatingKVCache.merge(stock)
    like_stock(cache, its, layout, [1, 1, 4, 1, 1], rows=3)
    for c in (cache, its):
        c.prepare(lengths=[2, 5, 4], right_padding=[3, 0, 1])
    like_stock(cache, its, layout, [5], rows=3)
    for c in (cache, its):
        c.finalize()
        c.filter([2, 0])
    like_stock(cache, its, layout, [1, 1, 1, 1, 1, 1, 1, 1, 1], rows=2)
    more = [c.extract(0) for c in (cache, its)]
    assert type(more[0]) is type(ours[0])
    for a, b in zip(more[0].keys_and_values(), (more[1].keys, more[1].values), strict=True):
        assert mx.array_equal(a, b)
    cache.extend(type(cache).merge([more[0]]))
    its.extend(BatchRotatingKVCache.merge([more[1]]))
    like_stock(cache, its, layout, [1, 2, 1], rows=3)


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_attention_over_records_is_that_over_what_they_stand_for(
    formats: tuple[Format, Format], dtype: mx.Dtype
) -> None:
    machine = Machine(Layout(*formats, sink=2, recent=3))
    machine.new = Vectors(dtype)
    caches = [machine.single(n)[0] for n in (4, 1, 9)]
    batch = caches[0].merge(caches)
    batch.prepare(lengths=[3, 2, 1], right_padding=[0, 1, 2])
    for cache, rows, n in ((caches[2], 1, 1), (caches[2], 1, 4), (batch, 3, 3), (batch, 3, 1)):
        mask = cache.make_mask(n, return_array=False, window_size=None)
        k, v = cache.update_and_fetch(*machine.new(rows, n))
        q = mx.random.normal((rows, 2 * HEADS, n, K_DIM), key=mx.random.key(5)).astype(dtype)
        sinks = mx.array([0.5, -1.0, 0.0, 2.0])
        got = cache.attend(q, scale=0.25, mask=mask, sinks=sinks.astype(dtype))
        expected = mx.fast.scaled_dot_product_attention(
            *(x.astype(mx.float32) for x in (q, k, v)), scale=0.25, mask=mask, sinks=sinks
        )
        assert (got.dtype, got.shape) == (dtype, (rows, 2 * HEADS, n, V_DIM))
        error = mx.abs(got.astype(mx.float32) - expected).max().item()
        assert error <= max(1e-5, 4 * mx.finfo(dtype).eps)
        if cache is batch and n == 3:
            batch.finalize()


def test_memory_is_that_of_records() -> None:
    layout = Layout(F4, F3)
    cache = records(KVCache(), layout)
    cache.update_and_fetch(*Vectors()(1, 256))
    words = [ops.attention.record_words(d, f) for d, f in ((K_DIM, F4), (V_DIM, F3))]
    assert cache.nbytes == 256 * HEADS * 4 * sum(words)
    window = records(KVCache(), Layout(F4, F3, sink=2, recent=4))
    window.update_and_fetch(*Vectors()(1, 256))
    assert window.nbytes - cache.nbytes == 6 * HEADS * 4 * (K_DIM + V_DIM)


def test_states_are_copied_whole() -> None:
    machine = Machine(Layout(F8, F3, sink=1, recent=4))
    cache, rows = machine.single(7, 2)
    twin = type(cache).__new__(type(cache))
    twin.state = cache.state
    copied = copy.deepcopy(cache)
    for one in (twin, copied):
        check(one, rows)
        one.update_and_fetch(*Vectors()(1, 2))
    check(cache, rows)
    mx.eval(cache.state)
    assert not hasattr(cache, "bits")  # stock attention would take it for its own quantized cache


def test_formats_do_not_mix() -> None:
    one, other = (records(KVCache(), Layout(F8, f)) for f in (F4, F8))
    for caches in ([one, other], [one, KVCache()]):
        with pytest.raises(KVError, match="different KV formats"):
            one.merge(caches)
    with pytest.raises(KVError, match="cannot be joined"):
        one.merge([one]).extend(other.merge([other]))
    with pytest.raises(KVError, match="cannot be joined"):
        one.merge([one]).extend(BatchKVCache([0]))
    filled = KVCache()
    filled.update_and_fetch(*Vectors()(1, 2))
    with pytest.raises(KVError, match="afterwards"):
        records(filled, Layout(F8, F8))


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_width_and_head_dim_where_stock_fails(bits: int, dim: int) -> None:
    x = mx.random.normal((1, 1, 3, dim), key=mx.random.key(bits))
    for group in (32, 64):
        fmt = Format("affine", bits, group)
        cache = records(KVCache(), Layout(fmt, fmt))
        k, v = cache.update_and_fetch(x, x)
        assert mx.array_equal(k, rounded(x, fmt))
        low, high = x.min().item(), x.max().item()
        assert mx.abs(v - x).max().item() <= (high - low) / (2**bits - 1) / 2 + 4e-3
        assert cache.size() == 3
    if (bits, dim) == (5, 128):
        with pytest.raises(ValueError, match="broadcast"):
            QuantizedKVCache(64, bits).update_and_fetch(x, x)
