"""MLX's unmodified kernels give what their definitions say, without a single report.

They are the emulator's proof: code that runs on real GPUs, not written for it. References are
float64; bounds come from the formats: one rounding to the output's type, float32 accumulation, and
for the matrix kernels the rounding of the dequantized tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from .emulator import Counters, Module, Out, needs_emulator
from .mlx_headers import (
    ATTENTION,
    DTYPES,
    INCLUDE,
    QUANTIZED,
    SDPA_VECTOR,
    buffer_dtype,
    random,
    to_buffer,
    to_float64,
)
from .mlx_quantize import gpu_quantize

pytestmark = needs_emulator

GROUP = 64
KINDS = tuple(DTYPES)
BITS = (4, 8)
FLOAT_ROUNDOFF = 2.0**-24


@dataclass
class Quantized:
    """x [rows, inner] @ W[out, inner].T with W = scale code + bias, exact in float64."""

    kind: str
    bits: int
    rows: int
    out: int
    inner: int

    def __post_init__(self) -> None:
        self.x = random(self.kind, self.rows, self.inner, seed=1)
        weight = random(self.kind, self.out, self.inner)
        self.w, self.scales, self.biases = mx.quantize(weight, GROUP, self.bits)
        codes = unpack(np.array(self.w).view(np.uint8), self.bits).astype(np.float64)
        codes = codes.reshape(self.out, self.inner // GROUP, GROUP)
        scales = to_float64(to_buffer(self.scales))[..., None]
        biases = to_float64(to_buffer(self.biases))[..., None]
        shape = (self.out, self.inner)
        x = to_float64(to_buffer(self.x))
        self.exact = x @ (codes * scales + biases).reshape(shape).T
        self.magnitude = np.abs(x) @ (codes * np.abs(scales) + np.abs(biases)).reshape(shape).T

    def check(self, got: np.ndarray, tile_is_rounded: bool) -> None:
        roundoff = DTYPES[self.kind][1]
        relative = self.inner * FLOAT_ROUNDOFF + roundoff * tile_is_rounded
        bound = roundoff * np.abs(self.exact) + relative * self.magnitude
        assert (np.abs(to_float64(got) - self.exact) <= bound).all()

    def buffers(self) -> dict[int, np.ndarray]:
        operands = (self.w, self.scales, self.biases, self.x)
        return {i: to_buffer(operand) for i, operand in enumerate(operands)}

    def output(self) -> Out:
        return Out((self.rows, self.out), buffer_dtype(self.kind))


NO_BATCH = np.zeros(1, np.int32)
NO_STRIDES = np.zeros(1, np.int64)
# The batch arguments that follow the sizes of every quantized kernel; there is no batch here.
BATCH = (np.int32(0), NO_BATCH, NO_STRIDES, np.int32(0), NO_BATCH, *3 * (NO_STRIDES,))


@pytest.fixture(scope="module")
def quantized() -> Module:
    kernels = {}
    for kind in KINDS:
        for bits in BITS:
            key, types = f"{kind}_{bits}", f"{kind}, {GROUP}, {bits}"
            kernels[f"qmv_fast_{key}"] = f"affine_qmv_fast<{types}, false>"
            kernels[f"qmv_{key}"] = f"affine_qmv<{types}, false>"
            kernels[f"qmm_t_{key}_true"] = f"affine_qmm_t<{types}, true, false>"
            kernels[f"qmm_t_{key}_false"] = f"affine_qmm_t<{types}, false, false>"
    for bits in BITS:
        kernels[f"dequantize_{bits}"] = f"affine_dequantize<half, {GROUP}, {bits}>"
    return Module(source=QUANTIZED, kernels=kernels, include=[INCLUDE])


def run_vector(module: Module, name: str, case: Quantized) -> tuple[np.ndarray, Counters]:
    arguments = case.buffers() | {4: case.output(), 5: np.int32(case.inner), 6: np.int32(case.out)}
    arguments |= {7 + i: argument for i, argument in enumerate(BATCH)}
    kernel = f"{name}_{case.kind}_{case.bits}"
    grid = (case.rows, -(-case.out // 8), 1)
    (y,), counters = module(kernel, arguments, grid=grid, threads=(32, 2, 1))
    return y, counters


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_qmv_fast(quantized: Module, kind: str, bits: int) -> None:
    case = Quantized(kind, bits, rows=2, out=16, inner=1024)
    y, counters = run_vector(quantized, "qmv_fast", case)
    case.check(y, tile_is_rounded=False)
    assert counters.bytes_read[0] == 2 * case.w.nbytes  # each row of x reads each weight once
    assert counters.bytes_written[4] == y.nbytes
    assert counters.lines_read[0] * 64 == case.w.nbytes
    assert counters.barriers == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_qmv_with_ragged_sizes(quantized: Module, kind: str, bits: int) -> None:
    # The last threadgroups compute rows again that others have, and store the same values.
    case = Quantized(kind, bits, rows=3, out=60, inner=960)
    y, _ = run_vector(quantized, "qmv", case)
    case.check(y, tile_is_rounded=False)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "out"), [(32, 64), (37, 50)], ids=["aligned", "ragged"])
def test_qmm_t(quantized: Module, kind: str, bits: int, rows: int, out: int) -> None:
    case = Quantized(kind, bits, rows, out, inner=192)
    sizes = (np.int32(case.inner), np.int32(out), np.int32(rows))
    arguments = case.buffers() | {4: case.output()}
    arguments |= {5 + i: argument for i, argument in enumerate((*sizes, *BATCH))}
    kernel = f"qmm_t_{kind}_{bits}_{'true' if out % 32 == 0 else 'false'}"
    grid = (-(-out // 32), -(-rows // 32), 1)
    (y,), counters = quantized(kernel, arguments, grid=grid, threads=(32, 2, 2))
    case.check(y, tile_is_rounded=True)
    # Every threadgroup makes a 32x32 tile of 8x8x8 products.
    assert counters.operations["multiply"] == grid[0] * grid[1] * 4 * 4 * (case.inner // 8)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes [out, inner] of bytes [out, inner * bits / 8]."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def minmax(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and biases of float32 groups [..., group] as MLX's GPU kernel defines them: a
    range that holds zero where all weights are negative, and ties that go away from zero."""

    def away(x: np.ndarray) -> np.ndarray:
        return np.trunc(x) + np.copysign(np.abs(x - np.trunc(x)) >= 0.5, x)

    top = np.float32(2**bits - 1)
    low, high = w.min(-1, keepdims=True), np.maximum(w.max(-1, keepdims=True), 0)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    negative = np.abs(low) > np.abs(high)
    scale, edge = np.where(negative, scale, -scale), np.where(negative, low, high)
    steps = away(edge / scale)
    scale = np.divide(edge, steps, out=scale, where=steps != 0)
    bias = np.where(steps == 0, 0, edge).astype(np.float32)
    return np.minimum(away((w - bias) / scale), top), scale, bias


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantize(kind: str, bits: int) -> None:
    w = np.array(random("float", 8, GROUP))
    w[0] = np.arange(GROUP) / 2 - 2 ** (bits - 1)  # with the edges below, steps of one: ties
    w[0, -2:] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w[0] = np.clip(w[0], w[0, -2], w[0, -1])
    w[6:] = -np.abs(w[6:]) - 1
    given = mx.array(w).astype(DTYPES[kind][0])
    codes, scales, biases = minmax(to_float64(to_buffer(given)).astype(np.float32), bits)
    got = gpu_quantize(given, GROUP, bits)
    assert (unpack(np.array(got[0]).view(np.uint8), bits) == codes).all()
    for found, expected in zip(got[1:], (scales, biases), strict=True):
        assert mx.array_equal(found, mx.array(expected).astype(found.dtype))


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_exactly_mlx(quantized: Module, bits: int) -> None:
    out, inner = 16, 256
    w, scales, biases = mx.quantize(random("half", out, inner), GROUP, bits)
    packed = to_buffer(w).view(np.uint8)
    (back,), _ = quantized(
        f"dequantize_{bits}",
        {0: packed, 1: to_buffer(scales), 2: to_buffer(biases), 3: Out((out, inner), np.float16)},
        grid=(packed.size, 1, 1),
        threads=(64, 1, 1),
        dispatch_threads=True,
    )
    assert (back == np.array(mx.dequantize(w, scales, biases, GROUP, bits))).all()


def attention_reference(
    q: mx.array, k: mx.array, v: mx.array, causal: bool, sinks: mx.array | None = None
) -> np.ndarray:
    """softmax(q k' / sqrt(D)) v in float64; [batch, heads, length, D], keys shared by groups."""
    values = [to_float64(to_buffer(a)) for a in (q, k, v)]
    repeats = q.shape[1] // k.shape[1]
    query, key, value = values[0], *(np.repeat(a, repeats, axis=1) for a in values[1:])
    scores = query @ key.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    if causal:
        offset = k.shape[2] - q.shape[2]
        ahead = np.arange(k.shape[2]) > offset + np.arange(q.shape[2])[:, None]
        scores = np.where(ahead, -np.inf, scores)
    peak = scores.max(axis=-1, keepdims=True)
    total = 0.0
    if sinks is not None:
        sink = to_float64(to_buffer(sinks)).reshape(1, -1, 1, 1)
        peak = np.maximum(peak, sink)
        total = np.exp(sink - peak)
    weights = np.exp(scores - peak)
    return weights / (weights.sum(axis=-1, keepdims=True) + total) @ value


@pytest.fixture(scope="module")
def sdpa() -> Module:
    kernels = {f"{kind}_{d}": f"sdpa_vector<{kind}, {d}, {d}>" for kind in KINDS for d in (64, 128)}
    module = Module(source=SDPA_VECTOR, kernels=kernels, include=[INCLUDE])
    for name in module.built.constants:
        module.constant(name, 0)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("depth", "heads", "key_heads", "queries", "keys", "causal"),
    [(64, 4, 2, 1, 77, False), (128, 2, 1, 3, 50, True)],
    ids=["grouped", "causal-with-sinks"],
)
def test_sdpa_vector(
    sdpa: Module,
    kind: str,
    depth: int,
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    causal: bool,
) -> None:
    q = random(kind, 1, heads, queries, depth)
    k = random(kind, 1, key_heads, keys, depth, seed=1)
    v = random(kind, 1, key_heads, keys, depth, seed=2)
    sinks = random(kind, heads, seed=3) if causal else None
    sdpa.constant("do_causal", causal)
    sdpa.constant("has_sinks", causal)
    head_stride, row_stride = np.uint64(keys * depth), np.uint64(depth)
    arguments = {
        **{0: to_buffer(q), 1: to_buffer(k), 2: to_buffer(v)},
        **{3: Out(q.shape, buffer_dtype(kind)), 4: np.int32(heads // key_heads), 5: np.int32(keys)},
        **{6: head_stride, 7: row_stride, 8: head_stride, 9: row_stride},
        10: np.float32(depth**-0.5),
    }
    if sinks is not None:
        arguments |= {16: to_buffer(sinks), 17: np.int32(heads)}
    (o,), counters = sdpa(
        f"{kind}_{depth}", arguments, grid=(heads, queries, 1), threads=(1024, 1, 1)
    )
    expected = attention_reference(q, k, v, causal, sinks)
    largest = np.abs(to_float64(to_buffer(v))).max()
    bound = DTYPES[kind][1] * np.abs(expected) + (keys + depth) * FLOAT_ROUNDOFF * largest
    assert (np.abs(to_float64(o) - expected) <= bound).all()
    assert counters.operations["sum"] > 0
    assert counters.threads == 1024 * heads * queries


TILE = 32
ATTENTION_PARAMETERS = np.dtype(
    [
        ("sizes", "i4", 6),  # batch, heads, depth, queries, keys, heads a key head
        ("scale", "f4"),
        ("tiles", "i4", 7),  # query and key tiles, whole ones, what is left, offset of the queries
        *((name, "i8", 3) for name in ("q", "k", "v", "o")),
    ]
)


@pytest.fixture(scope="module")
def flash() -> Module:
    kernel = f"attention<half, {TILE}, {TILE}, 64, 64, 4, 1, half, float>"
    module = Module(source=ATTENTION, kernels={"flash": kernel}, include=[INCLUDE])
    for name in module.built.constants:
        module.constant(name, 0)
    return module


@pytest.mark.parametrize(
    ("heads", "key_heads", "queries", "keys", "causal"),
    [(2, 1, 64, 64, False), (2, 2, 50, 77, False), (2, 1, 70, 70, True)],
    ids=["aligned", "ragged", "causal"],
)
def test_steel_attention(
    flash: Module, heads: int, key_heads: int, queries: int, keys: int, causal: bool
) -> None:
    depth = 64
    q = random("half", 1, heads, queries, depth)
    k = random("half", 1, key_heads, keys, depth, seed=1)
    v = random("half", 1, key_heads, keys, depth, seed=2)
    p = np.zeros(1, ATTENTION_PARAMETERS)
    whole, left = (queries // TILE, keys // TILE), (queries % TILE, keys % TILE)
    tiles = (-(-queries // TILE), -(-keys // TILE))
    p["sizes"] = (1, heads, depth, queries, keys, heads // key_heads)
    p["scale"] = depth**-0.5
    p["tiles"] = (*tiles, *whole, *left, keys - queries)
    p["q"] = p["o"] = (heads * queries * depth, queries * depth, depth)
    p["k"] = p["v"] = (key_heads * keys * depth, keys * depth, depth)
    flash.constant("align_Q", left[0] == 0)
    flash.constant("align_K", left[1] == 0)
    flash.constant("do_causal", causal)
    arguments = {0: to_buffer(q), 1: to_buffer(k), 2: to_buffer(v), 3: Out(q.shape, np.float16)}
    (o,), counters = flash(
        "flash", arguments | {4: p}, grid=(tiles[0], heads, 1), threads=(32, 4, 1)
    )
    expected = attention_reference(q, k, v, causal)
    # q is scaled, and the probabilities are stored, in half precision: two roundings of weights
    # that sum to one, of scores up to the largest.
    largest = np.abs(to_float64(to_buffer(v))).max()
    scores = (
        np.linalg.norm(to_float64(to_buffer(q)), axis=-1).max()
        * np.linalg.norm(to_float64(to_buffer(k)), axis=-1).max()
        / np.sqrt(depth)
    )
    bound = DTYPES["half"][1] * (np.abs(expected) + (2 * scores + 2) * largest)
    assert (np.abs(to_float64(o) - expected) <= bound).all()
    assert counters.operations["multiply"] > 0
    assert counters.barriers > 0


def test_fast_mode_runs_a_whole_layer() -> None:
    kernels = {"qmv_fast_half_4": f"affine_qmv_fast<half, {GROUP}, 4, false>"}
    module = Module(source=QUANTIZED, kernels=kernels, include=[INCLUDE], mode="fast")
    case = Quantized("half", 4, rows=1, out=4096, inner=4096)
    y, counters = run_vector(module, "qmv_fast", case)
    case.check(y, tile_is_rounded=False)
    assert counters.threads == 4096 // 8 * 64
