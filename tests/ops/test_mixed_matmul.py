"""Several weights of different widths that share their input, against the single products."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq import ops
from optiq.formats import AFFINE_BITS, AFFINE_GROUPS
from optiq.ops import native
from optiq.ops.cases import DTYPES, Product

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"no kernels: {native.reason}")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_the_single_products(data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 40))
    inner = 128 * data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    cases = [
        Product(
            rows,
            data.draw(st.integers(1, 70)),
            inner,
            data.draw(st.sampled_from(AFFINE_BITS)),
            data.draw(st.sampled_from(AFFINE_GROUPS)),
            dtype,
        )
        for _ in range(data.draw(st.integers(1, 10)))
    ]
    x = cases[0].activations()
    exact = data.draw(st.booleans())
    outs = ops.mixed_quantized_matmul(x, [case.affine() for case in cases], exact=exact)
    for out, case in zip(outs, cases, strict=True):
        alone = ops.quantized_matmul(
            x, *case.quantized(), group_size=case.group_size, bits=case.bits, exact=exact
        )
        assert out.dtype == alone.dtype
        assert mx.array_equal(out, alone)
        if rows:
            assert case.part(out, fixed=not exact or x.dtype != mx.float32) <= 1


def test_transforms_are_those_of_the_single_products() -> None:
    cases = [Product(6, 40, 256, 4, 64), Product(6, 24, 256, 3, 128)]
    weights, x = [case.affine() for case in cases], cases[0].activations()
    pull = [mx.random.normal((6, case.out)) for case in cases]

    def loss(x: mx.array) -> mx.array:
        outs = ops.mixed_quantized_matmul(x, weights)
        return sum((y * p).sum() for y, p in zip(outs, pull, strict=True))

    expected = sum(
        p @ mx.dequantize(w.codes, w.scales, w.biases, w.group_size, w.bits)
        for p, w in zip(pull, weights, strict=True)
    )
    assert mx.allclose(mx.grad(loss)(x), expected, rtol=1e-4, atol=1e-3)

    def both(x: mx.array) -> list[mx.array]:
        return ops.mixed_quantized_matmul(x, weights)

    for got in (mx.vmap(both)(x), mx.compile(both)(x), mx.compile(both, shapeless=True)(x)):
        assert all(mx.array_equal(a, b) for a, b in zip(got, both(x), strict=True))
    _, tangents = mx.jvp(both, [x], [x])
    assert all(mx.array_equal(a, b) for a, b in zip(tangents, both(x), strict=True))


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Product(3, 20, 128, 4)
    expected = ops.mixed_quantized_matmul(case.activations(), [case.affine()])[0]
    monkeypatch.setattr(native, "extension", None)
    (out,) = ops.mixed_quantized_matmul(case.activations(), [case.affine()])
    assert mx.allclose(out, expected, rtol=1e-3, atol=1e-3)


def test_wrong_input_names_the_part() -> None:
    good = Product(1, 16, 128, 4).affine()
    x = mx.zeros((2, 128))
    for parts, message in (
        ([], "parts is empty"),
        ([good, good._replace(bits=3)], r"parts\[1\]\.w is"),
        ([good._replace(group_size=48)], r"parts\[0\]\.group_size is 48"),
        ([good, Product(1, 16, 256, 4).affine()], "the last axis of x is 128"),
        ([good._replace(codes=good.scales)], r"parts\[0\]\.w is"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.mixed_quantized_matmul(x, parts)
