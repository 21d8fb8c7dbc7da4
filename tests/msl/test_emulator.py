"""The emulator's Metal: vectors, types, simdgroups, matrices, atomics, launches, counters.

One source for most of it, because a compilation costs more than all launches together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from .emulator import InOut, KernelError, Module, Out, needs_emulator
from .mlx_headers import to_float64

pytestmark = needs_emulator

HEADER = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
THREAD = "uint i [[thread_position_in_grid]]"
LANES = np.arange(32)
MODES = ("check", "fast")

VALUES = f"""
kernel void vectors(device const float* x, device float4* y, {THREAD}) {{
  float4 v = float4(x[0], x[1], x[2], x[3]);
  y[0] = v.wzyx;
  y[1] = float4(v.xy, 5, 6);
  y[2] = float4(7.5f);
  y[3] = float4(int4(v * 1.5f));  // converts, truncating; does not reinterpret
  y[4] = float4(half4(v) * half4(1.0h / 3.0h));
  v.xz = v.zx;
  y[5] = v;
  y[6] = select(v, float4(0), v > 2.0f);
  y[7] = float4(dot(v, v), any(v > 3.5f), all(v > 3.5f), length(float2(3, 4)));
  y[8] = max(v, 2.0f) + clamp(v, 1.5f, 2.5f);
  y[9] = float4(vec<float, 2>(1, 2), vec<half, 2>(3, 4));
  float2 w(8, 9);
  y[10] = float4(w, w.y, as_type<float>(0x3f800000u));
  y[11] = unpack_unorm4x8_to_float(0xff800033u) * 255;
}}
kernel void conversions(device const float* x, device float* y, device bfloat* b, {THREAD}) {{
  half a = half(x[0]), c = half(x[1]);
  y[0] = float(a * a + c);  // rounds the product to half, then the sum
  y[1] = float(fma(a, a, c));
  b[0] = bfloat(x[2]);
  b[1] = bfloat(x[3]);
  y[2] = x[0] * 0.1;  // there is no double: 0.1 is a float
  y[3] = float(uchar(300)) + float(char(200));
  y[4] = float(as_type<ushort>(half(1)));
  y[5] = static_cast<float>(static_cast<bfloat>(static_cast<half>(x[1])));
  y[6] = float(numeric_limits<half>::max()) + float(numeric_limits<char>::min());
  y[7] = float(popcount(0xf0u) + clz(1u) + extract_bits(0xabcdu, 4, 8)) + mulhi(1u << 31, 4u);
}}
kernel void functions(device const float* x, device float* y, {THREAD}) {{
  float v = x[i];
  y[12 * i] = exp(v);
  y[12 * i + 1] = fast::log(v);
  y[12 * i + 2] = rsqrt(v);
  y[12 * i + 3] = precise::tanh(v);
  y[12 * i + 4] = pow(v, 1.5f);
  y[12 * i + 5] = round(v) + floor(v) + rint(v);
  y[12 * i + 6] = fract(v);
  y[12 * i + 7] = min(max(v, 1.0f), 2.0f);
  y[12 * i + 8] = fmod(v, 0.7f);
  y[12 * i + 9] = sign(-v) + abs(-v) + saturate(v) + mix(v, 2 * v, 0.25f);
  y[12 * i + 10] = max(NAN, v) + float(isnan(NAN)) + float(isinf(INFINITY));
  y[12 * i + 11] = float(half(exp(half(v))));
}}
"""


@pytest.fixture(scope="module", params=MODES)
def values(request: pytest.FixtureRequest) -> Module:
    return Module(source=HEADER + VALUES, mode=request.param)


def test_vectors(values: Module) -> None:
    x = np.array([1, 2, 3, 4], np.float32)
    (y,), _ = values("vectors", {0: x, 1: Out((12, 4), np.float32)}, (1, 1, 1), (1, 1, 1))
    third = (x.astype(np.float16) * np.float16(1 / 3)).astype(np.float32)
    expected = [
        [4, 3, 2, 1],
        [1, 2, 5, 6],
        [7.5] * 4,
        [1, 3, 4, 6],
        third,
        [3, 2, 1, 4],
        [0, 2, 1, 0],
        [30, 1, 0, 5],
        [3 + 2.5, 2 + 2, 2 + 1.5, 4 + 2.5],
        [1, 2, 3, 4],
        [8, 9, 9, 1],
        [0x33, 0, 0x80, 0xFF],
    ]
    np.testing.assert_array_equal(y, np.array(expected, np.float32))


def test_conversions_round_as_metal_does(values: Module) -> None:
    # 1.001^2 needs more bits than half has, 1 + 2^-8 is a tie between two bfloats.
    x = np.array([1.001, 0.5, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    buffers = {0: x, 1: Out(8, np.float32), 2: Out(2, np.uint16)}
    (y, b), _ = values("conversions", buffers, (1, 1, 1), (1, 1, 1))
    a, c = np.float16(x[0]), np.float16(x[1])
    fused = np.float16(np.float64(a) * np.float64(a) + np.float64(c))
    assert y[0] == np.float32(a * a + c)
    assert y[1] == np.float32(fused)
    assert to_float64(b).tolist() == [1.0, 1 + 2**-6]  # to even
    assert y[2] == x[0] * np.float32(0.1)
    assert y[3] == 300 % 256 + (200 - 256)
    assert y[4] == 0x3C00
    assert y[5] == 0.5
    assert y[6] == 65504 - 128
    assert y[7] == 4 + 31 + 0xBC + 2


def test_functions(values: Module) -> None:
    x = np.array([0.3, 1.5, 2.5], np.float32)
    (y,), _ = values("functions", {0: x, 1: Out((3, 12), np.float32)}, (3, 1, 1), (1, 1, 1))
    v = x.astype(np.float64)
    expected = np.stack(
        [
            np.exp(v),
            np.log(v),
            v**-0.5,
            np.tanh(v),
            v**1.5,
            np.floor(v + 0.5) + np.floor(v) + np.rint(v),
            v - np.floor(v),
            np.clip(v, 1, 2),
            np.fmod(v, 0.7),
            -1 + v + np.clip(v, 0, 1) + 1.25 * v,
            v + 2,
            np.exp(x.astype(np.float16).astype(np.float64)),
        ],
        axis=1,
    )
    np.testing.assert_allclose(y[:, :11], expected[:, :11], rtol=2**-20)
    np.testing.assert_allclose(y[:, 11], expected[:, 11], rtol=2**-11)


# expression over v (float), n (int), lane: what 32 lanes with v = x[lane], n = lane + 1 get
SIMD: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "sum": ("simd_sum(v)", lambda v: np.full(32, v.sum())),
    "max": ("simd_max(v)", lambda v: np.full(32, v.max())),
    "min": ("simd_min(v)", lambda v: np.full(32, v.min())),
    "half_max": ("float(simd_max(half(n)))", lambda v: np.full(32, 32.0)),
    "int_sum": ("float(simd_sum(n))", lambda v: np.full(32, 528.0)),
    "product": ("simd_product(1.0f + (lane % 2))", lambda v: np.full(32, 2.0**16)),
    "or": ("float(simd_or(n))", lambda v: np.full(32, 63.0)),
    "and": ("float(simd_and(n | 64))", lambda v: np.full(32, 64.0)),
    "xor": ("float(simd_xor(n))", lambda v: np.full(32, 32.0)),
    "inclusive": ("float(simd_prefix_inclusive_sum(n))", lambda v: np.cumsum(LANES + 1)),
    "exclusive": ("float(simd_prefix_exclusive_sum(n))", lambda v: np.cumsum(LANES)),
    "broadcast": ("simd_broadcast(v, 7)", lambda v: np.full(32, v[7])),
    "first": ("simd_broadcast_first(v)", lambda v: np.full(32, v[0])),
    "shuffle": ("simd_shuffle(v, ushort(31 - lane))", lambda v: v[::-1]),
    "shuffle_xor": ("simd_shuffle_xor(v, 5)", lambda v: v[LANES ^ 5]),
    "down": ("simd_shuffle_down(v, 4)", lambda v: np.r_[v[4:], v[28:]]),
    "up": ("simd_shuffle_up(v, 4)", lambda v: np.r_[v[:4], v[:28]]),
    "rotate_down": ("simd_shuffle_rotate_down(v, 3)", lambda v: np.roll(v, -3)),
    "rotate_up": ("simd_shuffle_rotate_up(v, 3)", lambda v: np.roll(v, 3)),
    "fill_down": (
        "simd_shuffle_and_fill_down(v, float(n), 2)",
        lambda v: np.r_[v[2:], [1.0, 2.0]],
    ),
    "fill_up": ("simd_shuffle_and_fill_up(v, float(n), 2)", lambda v: np.r_[[31.0, 32.0], v[:30]]),
    "vector": ("simd_shuffle_xor(float4(v, 0, 0, v), 1).w", lambda v: v[LANES ^ 1]),
    "any": ("float(simd_any(lane == 9))", lambda v: np.ones(32)),
    "all": ("float(simd_all(lane != 9))", lambda v: np.zeros(32)),
    "ballot": ("float(ulong(simd_ballot(lane < 4)))", lambda v: np.full(32, 15.0)),
    "is_first": ("float(simd_is_first())", lambda v: (LANES == 0).astype(float)),
    "quad_sum": ("float(quad_sum(n))", lambda v: (LANES + 1).reshape(8, 4).sum(1).repeat(4)),
    "quad_max": ("quad_max(v)", lambda v: v.reshape(8, 4).max(1).repeat(4)),
    "quad_xor": ("quad_shuffle_xor(v, 3)", lambda v: v[LANES ^ 3]),
    "quad_broadcast": ("quad_broadcast(v, 2)", lambda v: v.reshape(8, 4)[:, 2].repeat(4)),
}


def simd_source() -> str:
    kernels = [
        f"kernel void lanes_{name}(device const float* x, device float* y, {THREAD}, "
        f"uint lane [[thread_index_in_simdgroup]]) "
        f"{{ float v = x[i]; int n = int(i % 32) + 1; (void)v; (void)n; y[i] = {expression}; }}"
        for name, (expression, _) in SIMD.items()
    ]
    return HEADER + "\n".join(kernels)


@pytest.fixture(scope="module", params=MODES)
def simd(request: pytest.FixtureRequest) -> Module:
    return Module(source=simd_source(), mode=request.param)


@pytest.mark.parametrize("name", SIMD)
def test_simdgroup_functions(simd: Module, name: str) -> None:
    x = np.random.default_rng(0).integers(-50, 50, 64).astype(np.float32)
    buffers = {0: x, 1: Out(64, np.float32)}
    expected = np.concatenate([SIMD[name][1](x[:32]), SIMD[name][1](x[32:])])
    for shuffle in (False, 3):
        (y,), counters = simd(f"lanes_{name}", buffers, (1, 1, 1), (64, 1, 1), shuffle=shuffle)
        np.testing.assert_array_equal(y, expected)
        assert counters.simdgroup_operations == 2  # one each simdgroup


TOGETHER = """
kernel void matrices(device const half* a, device const half* b, device float* c,
    device half* transposed, threadgroup half* tile [[threadgroup(0)]],
    uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_half8x8 left, right, turned;
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_load(left, a, 16, ulong2(8, 0));
  simdgroup_load(right, b);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_store(sum, c);
  simdgroup_store(left, tile, 8, ulong2(0, 0), true);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_load(turned, tile);
  simdgroup_store(turned, transposed);
  simdgroup_float8x8 unit(1.0f);
  simdgroup_multiply(sum, sum, unit);
  simdgroup_store(sum, c + 64);
  c[128 + lane] = sum.thread_elements()[1];
}
kernel void atomics(device atomic_uint* u, device atomic_int* s, device atomic_float* f,
    device uint* won, uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint shared;
  if (t == 0) atomic_store_explicit(&shared, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&shared, 1u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t == 0) atomic_fetch_add_explicit(&u[0], atomic_load_explicit(&shared, memory_order_relaxed),
                                        memory_order_relaxed);
  atomic_fetch_or_explicit(&u[1], 1u << (i % 32), memory_order_relaxed);
  atomic_fetch_and_explicit(&u[2], ~(1u << (i % 8)), memory_order_relaxed);
  atomic_fetch_max_explicit(&u[3], i, memory_order_relaxed);
  atomic_fetch_xor_explicit(&u[4], i, memory_order_relaxed);
  atomic_fetch_min_explicit(&s[0], -int(i), memory_order_relaxed);
  atomic_fetch_max_explicit(&s[1], -5 - int(i), memory_order_relaxed);
  atomic_fetch_sub_explicit(&s[2], 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&f[0], 0.5f, memory_order_relaxed);
  uint expected = 0;
  if (atomic_compare_exchange_weak_explicit(&u[5], &expected, i + 1, memory_order_relaxed,
                                            memory_order_relaxed))
    won[0] = i;
}
kernel void positions(device uint4* y, uint3 grid [[thread_position_in_grid]],
    ushort3 group [[threadgroup_position_in_grid]], uint2 inside [[thread_position_in_threadgroup]],
    uint index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]], uint3 all [[threads_per_grid]],
    uint3 threads [[threads_per_threadgroup]], uint3 groups [[threadgroups_per_grid]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint width [[threads_per_simdgroup]]) {
  uint at = (grid.y * all.x + grid.x) * 3;
  y[at] = uint4(grid.x, grid.y, group.x, group.y);
  y[at + 1] = uint4(inside.x, inside.y, index, simdgroup);
  y[at + 2] = uint4(lane, threads.x * 100 + threads.y, groups.x * 100 + groups.y,
                    simdgroups * 100 + width);
}
constant bool doubled [[function_constant(0)]];
constant int extra [[function_constant(1)]];
constant float table[4] = {1, 2, 3, 4};
struct Sizes { uint count; float factor; };
kernel void constants(device const float* x, device float* y, constant Sizes& sizes,
    uint i [[thread_position_in_grid]]) {
  if (i < sizes.count)
    y[i] = x[i] * sizes.factor * (doubled ? 2 : 1) + table[i & 3] +
        (is_function_constant_defined(extra) ? extra : 0);
}
template <typename T, int N> [[kernel]] void scaled(device const T* x [[buffer(0)]],
    device T* y [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i] = x[i] * T(N); }
template [[host_name("scaled_float_3")]] [[kernel]] decltype(scaled<float, 3>) scaled<float, 3>;
template [[host_name("scaled_int_5")]] [[kernel]] void scaled<int, 5>(device const int*,
    device int*, uint);
kernel void spin(device atomic_uint* u) {
  while (atomic_load_explicit(u, memory_order_relaxed) == 0) {}
}
"""


@pytest.fixture(scope="module", params=MODES)
def together(request: pytest.FixtureRequest) -> Module:
    return Module(source=HEADER + TOGETHER, mode=request.param)


def test_simdgroup_matrices(together: Module) -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (8, 16)).astype(np.float16)
    b = rng.integers(-4, 5, (8, 8)).astype(np.float16)
    buffers = {0: a, 1: b, 2: Out(160, np.float32), 3: Out((8, 8), np.float16)}
    (c, transposed), counters = together("matrices", buffers, (1, 1, 1), (32, 1, 1), {0: 128})
    product = a[:, 8:].astype(np.float32) @ b.astype(np.float32) + 1
    np.testing.assert_array_equal(c[:64].reshape(8, 8), product)
    np.testing.assert_array_equal(c[64:128].reshape(8, 8), product)
    np.testing.assert_array_equal(transposed, a[:, 8:].T)
    # Lane 0 holds (0, 0..1), lane 1 (0, 2..3), lane 8 (0, 4..5), lane 16 (4, 0..1).
    second = c[128:]
    expected = [product[0, 1], product[0, 3], product[0, 5], product[4, 1]]
    assert second[[0, 1, 8, 16]].tolist() == expected
    assert counters.operations["multiply"] == 2
    assert counters.threadgroup_memory == 128


@pytest.mark.parametrize("shuffle", [False, 7])
def test_atomics(together: Module, shuffle: int) -> None:
    u = np.array([0, 0, 0xFFF, 0, 0, 0], np.uint32)
    buffers = {
        0: InOut(u),
        1: InOut(np.array([0, -1000, 0], np.int32)),
        2: InOut(np.zeros(1, np.float32)),
        3: Out(1, np.uint32),
    }
    (u, s, f, won), _ = together("atomics", buffers, (4, 1, 1), (64, 1, 1), shuffle=shuffle)
    assert u[:5].tolist() == [256, 0xFFFFFFFF, 0xF00, 255, 0]
    assert s.tolist() == [-255, -5, -256]
    assert f[0] == 128
    assert u[5] == won[0] + 1


@pytest.mark.parametrize("dispatch_threads", [False, True], ids=["threadgroups", "threads"])
def test_positions(together: Module, dispatch_threads: bool) -> None:
    width, height = 6, 4
    if dispatch_threads:
        width, height = 5, 3  # the last threadgroups are cut
    grid = (width, height, 1) if dispatch_threads else (2, 2, 1)
    (y,), counters = together(
        "positions",
        {0: Out((height, width, 3, 4), np.uint32)},
        grid,
        (3, 2, 1),
        dispatch_threads=dispatch_threads,
    )
    for row, column in np.ndindex(height, width):
        group_x, group_y = column // 3, row // 2
        threads_x, threads_y = min(3, width - 3 * group_x), min(2, height - 2 * group_y)
        index = row % 2 * threads_x + column % 3
        assert y[row, column].tolist() == [
            [column, row, group_x, group_y],
            [column % 3, row % 2, index, 0],
            [index, threads_x * 100 + threads_y, 202, 132],
        ]
    assert counters.threads == width * height
    assert counters.threadgroups == 4


def test_constants(together: Module) -> None:
    sizes = np.array([(5, 0.5)], [("count", "u4"), ("factor", "f4")])
    x = np.arange(8, dtype=np.float32)
    tables = np.array([1, 2, 3, 4, 1], np.float32)
    together.constant("doubled", False)
    buffers = {0: x, 1: InOut(np.zeros(8, np.float32)), 2: sizes}
    (y,), _ = together("constants", buffers, (1, 1, 1), (8, 1, 1))
    assert y.tolist() == [*(x[:5] * 0.5 + tables), 0, 0, 0]
    together.constant("doubled", True)
    together.constant("extra", -3)
    (y,), _ = together("constants", buffers, (1, 1, 1), (8, 1, 1))
    assert y[:5].tolist() == (x[:5] + tables - 3).tolist()
    with pytest.raises(KeyError, match="no function constant 'tripled'; this source has: doubled"):
        together.constant("tripled", True)


def test_host_names_and_templates(together: Module) -> None:
    assert {"matrices", "scaled_float_3", "scaled_int_5"} <= set(together.kernels)
    assert "scaled" not in together.kernels
    (y,), _ = together(
        "scaled_float_3",
        {0: np.ones(4, np.float32), 1: Out(4, np.float32)},
        (1, 1, 1),
        (4, 1, 1),
    )
    assert y.tolist() == [3] * 4
    (y,), _ = together(
        "scaled_int_5", {0: np.ones(4, np.int32), 1: Out(4, np.int32)}, (1, 1, 1), (4, 1, 1)
    )
    assert y.tolist() == [5] * 4


def test_a_kernel_that_never_ends_is_stopped(together: Module) -> None:
    with pytest.raises(KernelError, match=r"more than 1 seconds.*\.metal:\d+"):
        together("spin", {0: InOut(np.zeros(1, np.uint32))}, (1, 1, 1), (1, 1, 1), seconds=1)
