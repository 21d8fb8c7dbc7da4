"""Products of activations with dense and quantized weights, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq import ops
from optiq.formats import AFFINE_BITS, AFFINE_GROUPS
from optiq.ops import native, reference
from optiq.ops.cases import DENSE, QUANTIZED, Product, f64, product_part


def assert_product(
    out: mx.array, x: np.ndarray, w: np.ndarray, dtype: str, group_size: int = 0
) -> None:
    part = product_part(out, x, w, dtype, group_size)
    assert part <= 1, f"{part:.2f} times the bound"


def test_the_extension_is_what_is_tested() -> None:
    assert native.extension is not None, native.reason


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_matmul(case: Product) -> None:
    x, (codes, scales, biases) = case.activations(), case.quantized()
    for exact in (True, False):
        out = ops.quantized_matmul(
            x, codes, scales, biases, True, case.group_size, case.bits, exact=exact
        )
        assert out.dtype == x.dtype
        assert case.part(out, fixed=not exact or x.dtype != mx.float32) <= 1


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 20])
def test_exact_products_have_the_error_of_floats(bits: int, rows: int) -> None:
    """Root mean square; also where the largest value of a group rounds up."""
    inner = 512
    for seed in range(3):
        r = np.random.default_rng(seed)
        w, x = (mx.array(r.standard_normal((n, inner), dtype=np.float32)) for n in (48, rows))
        packed = mx.quantize(w, 64, bits)
        expected = f64(x) @ f64(mx.dequantize(*packed, 64, bits)).T
        got = f64(ops.quantized_matmul(x, *packed, group_size=64, bits=bits))
        assert np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()) < 4e-7


@pytest.mark.parametrize("case", QUANTIZED[::4], ids=str)
def test_quantized_matmul_not_transposed(case: Product) -> None:
    x, (codes, scales, biases) = case.activations(case.out), case.quantized()
    out = ops.quantized_matmul(
        x, codes, scales, biases, False, group_size=case.group_size, bits=case.bits
    )
    assert case.part(out, transpose=False) <= 1


@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize("transpose", [True, False])
def test_linear(case: Product, transpose: bool) -> None:
    w = case.weight()
    x = case.activations(None if transpose else case.out)
    out = ops.linear(x, w, transpose=transpose)
    assert out.dtype == x.dtype
    assert case.part(out, transpose) <= 1


def test_float32_activations_stay_float32() -> None:
    case = Product(3, 40, 128, 4, dtype="bf16")
    x = case.activations().astype(mx.float32)
    codes, scales, biases = case.quantized()
    for exact in (True, False):
        out = ops.quantized_matmul(x, codes, scales, biases, exact=exact)
        assert out.dtype == mx.float32
        assert_product(out, f64(x), f64(case.affine()), "f32", 0 if exact else 64)
    assert_product(ops.linear(x, case.weight()), f64(x), f64(case.weight()), "f32")


@pytest.mark.parametrize("bits", [0, 2, 3, 4, 5, 6, 8])
def test_a_row_does_not_depend_on_the_rows_beside_it(bits: int) -> None:
    """Batched or speculative decoding must not move near-tie tokens: bit-equal up to 16 rows, and
    of quantized weights whatever the number."""
    case = Product(40 if bits else 16, 70, 256, bits)
    x = case.activations()

    def product(x: mx.array) -> mx.array:
        if bits == 0:
            return ops.linear(x, case.weight())
        return ops.quantized_matmul(x, *case.quantized(), bits=bits)

    together = product(x)
    for m in (1, 2, 3, 5, 7, 9, 13, 16, 17, 33):
        assert mx.array_equal(product(x[:m]), together[:m])


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_many_rows_have_the_error_of_floats(dtype: mx.Dtype, transpose: bool) -> None:
    """Values of all sizes: where pieces of them are multiplied, each is worth its own bits."""
    r = np.random.default_rng(1)
    x = r.standard_normal((70, 600), dtype=np.float32) * 10 ** r.uniform(-9, 9, (70, 1))
    w = mx.array(r.standard_normal((70, 600), dtype=np.float32)).astype(dtype)
    expected = f64(mx.array(x)) @ f64(w).T
    got = ops.linear(mx.array(x), w if transpose else w.T, transpose=transpose)
    error = np.abs(f64(got) - expected) / np.linalg.norm(x, axis=1, keepdims=True)
    assert error.max() < 3e-6
    assert np.sqrt((error**2).mean()) < 4e-7


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_what_is_not_finite_stays_in_its_row_of_many(dtype: mx.Dtype) -> None:
    x, w = (np.random.default_rng(i).standard_normal((70, 96)) for i in (1, 2))
    x[1, 3], x[2, 70], x[34, 5], w[7, 9] = np.nan, np.inf, -np.inf, np.inf
    out = np.array(ops.linear(mx.array(x, mx.float32), mx.array(w).astype(dtype)))
    lost = np.zeros((70, 70), dtype=bool)
    lost[[1, 2, 34]] = lost[:, 7] = True
    assert (np.isfinite(out) == ~lost).all()


def test_what_is_not_finite_stays_in_its_row() -> None:
    case = Product(4, 24, 128, 4)
    codes, scales, biases = case.quantized()
    x = np.array(case.activations())
    x[1, 3], x[2, 70], x[3] = np.nan, np.inf, 1e-38
    out = np.array(ops.quantized_matmul(mx.array(x), codes, scales, biases))
    assert np.isfinite(out[[0, 3]]).all()
    assert np.isnan(out[[1, 2]]).all()
    assert np.abs(out[3]).max() < 1e-30


def test_leading_axes_strides_and_empty_inputs() -> None:
    case = Product(12, 24, 64, 4)
    x, (codes, scales, biases) = case.activations(), case.quantized()
    flat = ops.quantized_matmul(x, codes, scales, biases)
    folded = ops.quantized_matmul(x.reshape(2, 3, 2, 64), codes, scales, biases)
    assert mx.array_equal(folded.reshape(12, 24), flat)
    strided = mx.repeat(x, 2, axis=0)[::2]
    assert mx.array_equal(ops.quantized_matmul(strided, codes, scales, biases), flat)
    every_other = mx.repeat(codes, 2, axis=0)[::2], mx.repeat(scales, 2, axis=0)[::2]
    assert mx.array_equal(ops.quantized_matmul(x, *every_other, biases), flat)
    assert ops.quantized_matmul(x[:0], codes, scales, biases).shape == (0, 24)
    assert mx.array_equal(ops.linear(mx.zeros((2, 0)), mx.zeros((3, 0))), mx.zeros((2, 3)))


@pytest.mark.parametrize("bits", [0, 4])
def test_experts(bits: int) -> None:
    rng = np.random.default_rng(0)
    w = mx.array(rng.standard_normal((5, 24, 64), dtype=np.float32))
    x = mx.array(rng.standard_normal((11, 64), dtype=np.float32))
    which = rng.integers(0, 5, 11)
    indices = mx.array(which.astype(np.uint32))
    if bits:
        codes, scales, biases = mx.quantize(w, 64, bits)
        out = ops.quantized_matmul(x, codes, scales, biases, bits=bits, indices=indices)
        w = mx.dequantize(codes, scales, biases, 64, bits)
    else:
        out = ops.linear(x, w, indices=indices)
    for i, expert in enumerate(which):
        row = slice(i, i + 1)
        assert_product(out[row], f64(x[row]), f64(w[int(expert)]), "f32", 64 if bits else 0)


def test_gradients_match_stock() -> None:
    case = Product(6, 40, 128, 4)
    x, (codes, scales, biases) = case.activations(), case.quantized()
    w, pull = case.weight(), mx.random.normal((6, 40))

    def ours(x: mx.array, s: mx.array, b: mx.array) -> mx.array:
        return (ops.quantized_matmul(x, codes, s, b) * pull).sum()

    def stock(x: mx.array, s: mx.array, b: mx.array) -> mx.array:
        return ((x @ mx.dequantize(codes, s, b, 64, 4).T) * pull).sum()

    for argnum in range(3):
        a = mx.grad(ours, argnum)(x, scales, biases)
        b = mx.grad(stock, argnum)(x, scales, biases)
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-4)
    for argnum in range(2):
        a = mx.grad(lambda x, w: (ops.linear(x, w) * pull).sum(), argnum)(x, w)
        b = mx.grad(lambda x, w: ((x @ w.T) * pull).sum(), argnum)(x, w)
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("group_size", AFFINE_GROUPS)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_gradients_at_scales_and_biases(bits: int, group_size: int, transpose: bool) -> None:
    """Sums over groups of G * code and G, with G the gradient at the dequantized weight."""
    rows, columns, tokens = 77, 256, 37
    w = mx.random.normal((rows, columns), key=mx.random.key(bits))
    codes, scales, biases = mx.quantize(w, group_size, bits)
    shape = [(tokens, columns), (tokens, rows)]
    x, pull = (mx.random.normal(s, key=mx.random.key(7)) for s in shape[:: 1 if transpose else -1])

    def loss(scales: mx.array, biases: mx.array) -> mx.array:
        y = ops.quantized_matmul(x, codes, scales, biases, transpose, group_size, bits)
        return (y * pull).sum()

    found = mx.grad(loss, (0, 1))(scales, biases)
    left, right = (f64(pull), f64(x)) if transpose else (f64(x), f64(pull))
    grid = reference.dequantize(
        np.array(codes), np.ones(scales.shape), np.zeros(scales.shape), group_size, bits
    )
    for got, factor in zip(found, (grid, np.ones_like(grid)), strict=True):
        terms = ((left.T @ right) * factor).reshape(rows, -1, group_size)
        size = ((abs(left).T @ abs(right)) * factor).reshape(rows, -1, group_size).sum(-1)
        assert (abs(f64(got) - terms.sum(-1)) <= 2.0**-24 * (tokens + group_size) * size).all()


def test_transforms() -> None:
    case = Product(6, 40, 64, 5)
    x, (codes, scales, biases) = case.activations(), case.quantized()

    def f(x: mx.array) -> mx.array:
        return ops.quantized_matmul(x, codes, scales, biases, bits=5)

    y = f(x)
    assert mx.allclose(mx.vmap(f)(x), y, atol=1e-5)
    assert mx.allclose(mx.compile(f)(x), y, atol=1e-5)
    assert mx.allclose(mx.compile(f, shapeless=True)(x[:3]), y[:3], atol=1e-5)
    primal, tangent = mx.jvp(f, [x], [x])
    assert mx.allclose(primal[0], y, atol=1e-5)
    assert mx.allclose(tangent[0], y, atol=1e-5)


CODES, SCALES, BIASES = Product(1, 16, 128, 4).quantized()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"x": mx.zeros((2, 64))}, "x"),
        ({"x": mx.zeros((2, 128), dtype=mx.int32)}, "x is"),
        ({"w": CODES.astype(mx.int32)}, "uint32"),
        ({"w": CODES[:, :-1]}, "codes of shape"),
        ({"scales": SCALES[:, :1]}, "scales"),
        ({"biases": BIASES.astype(mx.float16)}, "biases"),
        ({"bits": 7}, "bits is 7"),
        ({"bits": 3}, "codes of shape"),
        ({"group_size": 48}, "group_size is 48"),
        ({"indices": mx.array([0], dtype=mx.uint32)}, "indices"),
    ],
)
def test_wrong_input_names_the_argument(change: dict[str, object], names: str) -> None:
    inputs = {"x": mx.zeros((2, 128)), "w": CODES, "scales": SCALES, "biases": BIASES}
    with pytest.raises(ValueError, match=names):
        ops.quantized_matmul(**{**inputs, **change})  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sgemm_that_mlx_calls(data: st.DataObject) -> None:
    """MLX's own float32 matmul, which calls our cblas_sgemm on Linux."""
    m, n, k = (data.draw(st.integers(1, 70)) for _ in range(3))
    rng = np.random.default_rng(m * 7919 + n * 104729 + k)
    a = rng.standard_normal((m, k), dtype=np.float32)
    b = rng.standard_normal((k, n), dtype=np.float32)
    left = mx.array(a.T.copy()).T if data.draw(st.booleans()) else mx.array(a)
    right = mx.array(b.T.copy()).T if data.draw(st.booleans()) else mx.array(b)
    assert_product(left @ right, a.astype(np.float64), b.T.astype(np.float64), "f32")
    c = rng.standard_normal((m, n), dtype=np.float32)
    out = mx.addmm(mx.array(c), left, right, alpha=0.5, beta=2.0)
    truth = 0.5 * (a.astype(np.float64) @ b) + 2.0 * c
    assert np.abs(f64(out) - truth).max() < 1e-4
