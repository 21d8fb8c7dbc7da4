"""Keys and values in few bits, and attention over them.

A quantized key or value of one head is a *record*, one row of uint32 words, so that a cache of
records grows, rolls and is sliced along its tokens like one of plain vectors:

    word 0 ... G-1   of each group: its scale (low half) and bias (high half), float16
    the others       codes, one little-endian bit stream

A value is `scale * code + bias`. The last group is shorter where `dim` is not a multiple of the
group size (head_dim 80 in groups of 32); zeros fill the code stream up to whole words.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import mlx.core as mx

from ..formats import DENSE, NO_KV_FORMAT, Format, is_kv_format
from . import metal, native
from .affine import pack
from .contest import Sample

Mask = mx.array | str | None
TIMED_KEYS = 256  # of a cache, at least


class Exact(NamedTuple):
    """Some keys and values that are also there in full precision `[B, kv_heads, n, dim]`."""

    keys: mx.array
    values: mx.array


def record_words(dim: int, fmt: Format) -> int:
    """uint32 words of the record of a vector of `dim` elements."""
    return -(-dim // fmt.group_size) + -(-dim * fmt.bits // 32)


def quantize_kv(x: mx.array, fmt: Format) -> mx.array:
    """Records of the vectors `x`, each rounded by the range of its groups.

    Scale and bias are rounded to float16 first and codes derived from them as stored.

    Args:
        x: `[..., dim]` in float32, float16 or bfloat16, of magnitude below 65504; `dim` a multiple
            of 8.
        fmt: An affine format of 3 to 8 bits in groups of 32 or 64.

    Returns:
        uint32 `[..., record_words(dim, fmt)]`.

    Raises:
        ValueError: A format or `dim` that has no records.
    """
    _check(x.shape[-1], fmt)

    def native_records(ext: ModuleType) -> mx.array:
        records: mx.array = ext.quantize_kv(x, fmt.group_size, fmt.bits)
        return records

    if ext := native.active():
        return native_records(ext)
    launch = x.dtype, x.shape[-1], fmt
    return metal.run("quantize_kv", launch, native_records, lambda: _records(x, fmt))


def _records(x: mx.array, fmt: Format) -> mx.array:
    """The same in `mx.*`."""
    dim, size = x.shape[-1], fmt.group_size
    groups = -(-dim // size)
    columns = mx.unflatten(mx.arange(groups * size), 0, (groups, size))
    filled = mx.minimum(columns, dim - 1).flatten()  # the last one again: no range changes
    g = mx.unflatten(x.astype(mx.float32)[..., filled], -1, (groups, size))
    low, high = g.min(axis=-1, keepdims=True), g.max(axis=-1, keepdims=True)
    top = 2**fmt.bits - 1
    scale = ((high - low) / top).astype(mx.float16)
    bias = low.astype(mx.float16)
    s, b = scale.astype(mx.float32), bias.astype(mx.float32)
    q = mx.clip(mx.round((g - b) / mx.where(s == 0, 1, s)), 0, top)
    q = mx.where((s == 0) | (columns >= dim), 0, q)
    words = pack(q.flatten(-2), fmt.bits)[..., : record_words(dim, fmt) - groups]
    header = mx.concatenate([scale, bias], axis=-1).view(mx.uint32).flatten(-2)
    return mx.concatenate([header, words], axis=-1)


def dequantize_kv(records: mx.array, dim: int, fmt: Format, dtype: mx.Dtype) -> mx.array:
    """The vectors `[..., dim]` in `dtype` that `records` stand for.

    Raises:
        ValueError: Records that are not as long as `dim` and `fmt` ask for.
    """
    _check(dim, fmt)
    if records.dtype != mx.uint32 or records.shape[-1] != record_words(dim, fmt):
        raise ValueError(
            f"[dequantize_kv] records {records.shape} {records.dtype} are not those of "
            f"{dim} values in {fmt}, which are uint32 and end in {record_words(dim, fmt)}"
        )
    if ext := native.active():
        vectors: mx.array = ext.dequantize_kv(records, dim, fmt.group_size, fmt.bits, dtype)
        return vectors
    groups = -(-dim // fmt.group_size)
    header = mx.contiguous(records[..., :groups]).view(mx.float16).astype(mx.float32)
    header = mx.unflatten(header, -1, (groups, 2))
    codes = records[..., groups:]
    missing = groups * fmt.group_size * fmt.bits // 32 - codes.shape[-1]
    if missing:
        codes = mx.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    out = mx.dequantize(codes, header[..., 0], header[..., 1], fmt.group_size, fmt.bits)
    return out[..., :dim].astype(dtype)


def quantized_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    k_format: Format,
    v_format: Format,
    scale: float,
    mask: Mask = None,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float = 0.0,
    starts: mx.array | None = None,
    first: Exact | None = None,
    recent: Exact | None = None,
    value_dim: int | None = None,
) -> mx.array:
    """Softmax attention over keys and values in few bits, accumulated in float32.

    The L queries of a row belong to its last L keys. Excluded keys get weight 0.

    Args:
        q: `[B, heads, L, dim]` in float32, float16 or bfloat16.
        k: Records of `k_format`, `[B, kv_heads, S, record_words(dim, k_format)]`; plain vectors
            `[B, kv_heads, S, dim]` where that is DENSE. `heads` is a multiple of `kv_heads`.
        v: The same for values, whose dimension is `value_dim`.
        mask: None, "causal", or an array that broadcasts to `[B, heads, L, S]`: bool (what is
            seen), or floating (added to the scores).
        window: With "causal", how many keys a query sees at most, itself included.
        sinks: `[heads]`, one more score per head whose value is nothing (gpt-oss).
        softcap: Scores become `softcap * tanh(score / softcap)`, unless 0 (Gemma 2).
        starts: int32 `[B]`, the first key of each row; those before it are padding.
        first: Exact vectors of the keys from `starts` on, used in place of their records.
        recent: Exact vectors of the last keys, likewise.
        value_dim: `dim` unless given.

    Returns:
        `[B, heads, L, value_dim]` in the dtype of `q`.

    Raises:
        ValueError: Shapes, dtypes or formats that do not fit together.
    """
    if window is not None and not isinstance(mask, str):
        raise ValueError('[quantized_attention] window needs mask="causal"')
    if window is not None and window < 1:
        raise ValueError(f"[quantized_attention] window is {window}; it must be 1 or more")
    dim = q.shape[-1]
    v_dim = value_dim or dim

    def native_attention(ext: ModuleType, q: mx.array = q) -> mx.array:
        out: mx.array = ext.quantized_attention(
            q,
            k,
            v,
            packing(k_format),
            packing(v_format),
            scale,
            *masking(mask),
            window or 0,
            sinks,
            softcap,
            starts,
            first,
            recent,
            v_dim,
        )
        return out

    def composed(q: mx.array = q) -> mx.array:
        keys = _plain(k, dim, k_format, q.dtype)
        values = _plain(v, v_dim, v_format, q.dtype)
        for exact, at in ((first, 0 if starts is None else starts), (recent, None)):
            if exact is not None:
                place = keys.shape[2] - exact.keys.shape[2] if at is None else at
                keys, values = (
                    overlay(a, e.astype(q.dtype), place)
                    for a, e in zip((keys, values), exact, strict=True)
                )
        seen = _seen(mask, q.shape[2], keys.shape[2], window, starts)
        if softcap:
            return capped_attention(q * scale, keys, values, seen, softcap, sinks)
        return mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=scale, mask=seen, sinks=sinks
        )

    if ext := native.active():
        return native_attention(ext)
    if native.on_cpu() or not _has_kernel(q, k, v_dim):
        return composed()
    exact = any(e is not None and e.keys.shape[2] for e in (first, recent))
    how = compiled_for(q, k, plain=not (isinstance(mask, mx.array) or softcap), exact=exact)
    launch = q.dtype, dim, v_dim, k_format, v_format, *how
    given = sinks, starts, *(first or ()), *(recent or ()), masking(mask)[1]
    reads = (k, v, *(a for a in given if a is not None))
    keys = max(TIMED_KEYS, 1 << (k.shape[2] - 1).bit_length())  # once for each power of two
    name = f"{'x'.join(map(str, q.shape[:3]))} queries, {k.shape[1]} x {keys} keys"
    refused = partial(
        metal.refusal, "quantized_attention", launch, q.dtype, native_attention, composed,
        Sample(name, tuple(q.shape), reads),
    )  # fmt: skip
    return metal.run("quantized_attention", launch, native_attention, composed, refused)


def _has_kernel(q: mx.array, k: mx.array, value_dim: int) -> bool:
    """Whether the Metal kernels take these shapes: where the keys are split, each split of at least
    128 writes all results to one array."""
    dims = q.shape[-1], value_dim
    splits = -(-k.shape[2] // 128) if _tile(q, k) else 0
    results = 4 * q.size // q.shape[-1] * value_dim * splits
    return all(dim % 8 == 0 and dim <= 256 for dim in dims) and results < 2**31


def _tile(q: mx.array, k: mx.array) -> int:
    """Queries that share a key head, in tiles as csrc/launch/attention.cpp makes them: up to 4 have
    kernels of their own; 0 for so many tokens that it does not split the keys."""
    rows = q.shape[2] * q.shape[1] // k.shape[1]
    return 0 if q.shape[2] > 32 else next((n for n in (1, 2, 3, 4, 8, 16) if rows <= n), 32)


def compiled_for(q: mx.array, k: mx.array, plain: bool, exact: bool) -> tuple[Hashable, ...]:
    """What else the kernels are compiled for: a tile, and what is to be done in it."""
    tile = _tile(q, k)
    words = ("masked",) if 0 < tile <= 4 and not (plain and q.shape[2] == 1) else ()
    return tile, *words, *(("exact",) if exact else ())


def _check(dim: int, fmt: Format) -> None:
    if not is_kv_format(fmt.bits, fmt.group_size):
        raise ValueError(NO_KV_FORMAT.format(fmt))
    if dim % 8:
        raise ValueError(f"vectors of {dim} elements cannot be quantized; use a multiple of 8")


def packing(fmt: Format) -> tuple[int, int]:
    """Group size and bits of records as the extension takes them, (0, 0) for plain vectors."""
    return (0, 0) if fmt == DENSE else (fmt.group_size, fmt.bits)


def masking(mask: Mask) -> tuple[str, mx.array | None]:
    """A mask as the extension takes it: a name, and an array if it is one."""
    if mask is None:
        return "", None
    return (mask, None) if isinstance(mask, str) else ("array", mask)


def _plain(x: mx.array, dim: int, fmt: Format, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype) if fmt == DENSE else dequantize_kv(x, dim, fmt, dtype)


def overlay(x: mx.array, tokens: mx.array, at: int | mx.array) -> mx.array:
    """`x [B, heads, S, dim]` with `tokens [B, heads, n, dim]` in place of its columns from `at` on.

    `at`, for all rows or int32 `[B]`, may be negative; what falls outside of `x` is left out.
    """
    n = tokens.shape[2]
    at = at if isinstance(at, int) else at[:, None]
    columns = mx.arange(x.shape[2])[None] - at  # index into `tokens`
    index = mx.broadcast_to(mx.clip(columns, 0, n - 1)[:, None, :, None], (*x.shape[:3], 1))
    inside = ((columns >= 0) & (columns < n))[:, None, :, None]
    return mx.where(inside, mx.take_along_axis(tokens, index, axis=2), x)


def _seen(
    mask: Mask, rows: int, size: int, window: int | None, starts: mx.array | None
) -> mx.array | str | None:
    """One mask for all that excludes keys."""
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'[quantized_attention] mask is {mask!r}; it must be "causal"')
        if window is None and starts is None:
            return mask
        query, key = mx.arange(size - rows, size)[:, None], mx.arange(size)
        mask = key <= query
        if window is not None:
            mask = mask & (key > query - window)
    if starts is None:
        return mask
    there = mx.arange(size) >= starts[:, None, None, None]
    if mask is None or mask.dtype == mx.bool_:
        return there if mask is None else mask & there
    return mx.where(there, mask, mx.finfo(mask.dtype).min)


def capped_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: Mask, cap: float, sinks: mx.array | None = None
) -> mx.array:
    """Attention of scaled queries `[B, heads, L, dim]` whose scores are `cap * tanh(score / cap)`.

    Keys and values are plain; what else is as in `quantized_attention`.
    """
    groups = q.shape[1] // k.shape[1]
    q = mx.unflatten(q, 1, (k.shape[1], groups))
    k, v = k[:, :, None], v[:, :, None]
    scores = cap * mx.tanh((q @ k.swapaxes(-1, -2)) / cap)
    rows, keys = scores.shape[-2:]
    if isinstance(mask, str):
        mask = mx.arange(keys - rows, keys)[:, None] >= mx.arange(keys)
    if mask is not None:
        if mask.ndim == 4:
            mask = mx.unflatten(mask, 1, (-1, groups)) if mask.shape[1] > 1 else mask[:, :, None]
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    if sinks is not None:
        sink = mx.unflatten(sinks, 0, (-1, groups))[:, :, None, None].astype(scores.dtype)
        sink = mx.broadcast_to(sink, (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, sink], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)[..., :keys]
    out: mx.array = weights @ v
    return out.flatten(1, 2)
