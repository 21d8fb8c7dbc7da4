"""What goes to the Metal kernels on a GPU, with a CPU that says it is one: the kernels that run
are those of the CPU, the decisions are real. On a Mac, tests/metal/test_on_gpu.py asks the GPU."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from optiq import ops
from optiq.formats import DENSE, Format
from optiq.ops import AffineWeight, kl, metal, native
from optiq.ops.trials import TRIALS, passes

if native.extension is None:
    pytest.skip(f"no native kernels: {native.reason}", allow_module_level=True)

Fault = Callable[..., Any]


class Extension:
    """The extension, with counted calls. `faults`, by function, get its result and arguments and
    return what it should seem to give."""

    def __init__(self, **faults: Fault) -> None:
        self.calls: Counter[str] = Counter()
        self.faults = faults

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            out = getattr(REAL, name)(*args, **kwargs)
            return self.faults[name](out, *args, **kwargs) if name in self.faults else out

        return call


REAL = native.extension


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Extension]:
    """Puts the process on a device, by name."""

    def put(device: str = "metal", **faults: Fault) -> Extension:
        extension = Extension(**faults)
        monkeypatch.setattr(native, "device", lambda: device)
        monkeypatch.setattr(native, "extension", extension)
        monkeypatch.delenv("OPTIQ_METAL", raising=False)
        return extension

    return put


def weight(out: int = 64, inner: int = 128, bits: int = 4) -> AffineWeight:
    dense = mx.random.normal((out, inner), key=mx.random.key(out))
    return AffineWeight(*mx.quantize(dense, 64, bits), 64, bits)


def activations(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(7))


def work() -> dict[str, Callable[[], Any]]:
    """A call of each op that has a trial -> what it gives."""
    w, x = weight(), activations(4, 128)
    form = Format("affine", 4, 32)
    q = activations(1, 2, 3, 128)
    kv = REAL.quantize_kv(activations(1, 1, 9, 128), 32, 4)
    return {
        "quantized_matmul": lambda: [ops.quantized_matmul(x, *w[:3])],
        "quantize": lambda: ops.quantize(x, Format("affine", 4, 64)),
        "kl_divergence": lambda: ops.kl_divergence(x, w, x[::-1], w)[::2],
        "quantize_kv": lambda: [ops.dequantize_kv(ops.quantize_kv(x, form), 128, form, x.dtype)],
        "quantized_attention": lambda: [
            ops.quantized_attention(q, kv, kv, k_format=form, v_format=form, scale=0.1)
        ],
    }


def close(got: Any, expected: Any) -> bool:
    return all(
        mx.allclose(a, b, rtol=1e-3, atol=1e-3).item() for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("op", TRIALS)
def test_an_op_is_tried_once_and_then_native(op: str, on: Any) -> None:
    extension = on()
    first = work()[op]()
    assert metal.proven(op) is extension
    extension.calls.clear()
    assert close(work()[op](), first)
    assert extension.calls == {op: 1}


@pytest.mark.parametrize("op", TRIALS)
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_where_the_trial_fails_mlx_runs_and_one_warning_says_so(
    op: str, fault: str, on: Any
) -> None:
    def broken(out: Any, *args: Any, **kwargs: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("no such function")
        if isinstance(out, mx.array):
            return (out * 1.1).astype(out.dtype)
        return [a * 1.1 for a in out]

    expected = work()[op]()
    extension = on(**{op: broken})
    with pytest.warns(RuntimeWarning, match=f"Metal kernel for {op} is left alone: .*selftest"):
        assert close(work()[op](), expected)
    extension.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(work()[op](), expected)
    assert not extension.calls


@pytest.mark.parametrize("op", TRIALS)
def test_metal_can_be_switched_off(op: str, on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = work()[op]()
    extension = on()
    monkeypatch.setenv("OPTIQ_METAL", "0")
    assert close(work()[op](), expected)
    assert not extension.calls


@pytest.mark.parametrize("op", TRIALS)
def test_other_gpus_run_mlx(op: str, on: Any) -> None:
    expected = work()[op]()
    extension = on("cuda")
    assert close(work()[op](), expected)
    assert not extension.calls


def scaled(out: mx.array) -> mx.array:
    return out * 1.01


# What is wrong -> the op that must not be used then, the function, and what it makes of its result.
FAULTS: dict[str, tuple[str, str, Fault]] = {
    "one row": (
        "quantized_matmul",
        "quantized_matmul",
        lambda y, x, *a, **k: scaled(y) if x.shape[0] == 1 else y,
    ),
    "the last of sixteen rows": (
        "quantized_matmul",
        "quantized_matmul",
        lambda y, x, *a, **k: y.at[15].add(1) if x.shape[0] == 16 else y,
    ),
    "not transposed": (
        "quantized_matmul",
        "quantized_matmul",
        lambda y, x, w, scales, biases, transpose, *a, **k: y if transpose else scaled(y),
    ),
    "experts": (
        "quantized_matmul",
        "quantized_matmul",
        lambda y, *a, indices=None: y if indices is None else y[::-1],
    ),
    "several": (
        "quantized_matmul",
        "mixed_quantized_matmul",
        lambda y, *a: [y[0], scaled(y[1])],
    ),
    "not a number": ("quantized_matmul", "quantized_matmul", lambda y, *a, **k: y * mx.nan),
    "codes": ("quantize", "quantize", lambda out, *a: [out[0] ^ 1, *out[1:]]),
    "scales of the search": (
        "quantize",
        "quantize",
        lambda out, w, importance, *a: (
            out if importance is None else [out[0], scaled(out[1]), out[2]]
        ),
    ),
    "kl": ("kl_divergence", "kl_divergence", lambda out, *a: [scaled(out[0]), *out[1:]]),
    "agreement": (
        "kl_divergence",
        "kl_divergence",
        lambda out, *a: [out[0], ~out[1], *out[2:]],
    ),
    "lse_q": ("kl_divergence", "kl_divergence", lambda out, *a: [*out[:3], scaled(out[3])]),
    "records": ("quantize_kv", "quantize_kv", lambda out, *a: out ^ 1),
    "a decode step": (
        "quantized_attention",
        "quantized_attention",
        lambda y, q, *a, **k: scaled(y) if q.shape[2] == 1 else y,
    ),
    "prefill": (
        "quantized_attention",
        "quantized_attention",
        lambda y, q, *a, **k: y.at[:, :, 32:].multiply(1.01) if q.shape[2] > 1 else y,
    ),
    "padding": (
        "quantized_attention",
        "quantized_attention",
        lambda y, *a, starts: REAL.quantized_attention(*a),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_trials_notice(fault: str) -> None:
    op, function, change = FAULTS[fault]
    assert passes(op, Extension())
    assert not passes(op, Extension(**{function: change}))


def test_many_rows_stay_with_stock_mlx(on: Any) -> None:
    extension = on()
    w, x = weight(), activations(2, 17, 128)
    assert metal.proven("quantized_matmul") is extension
    extension.calls.clear()
    ops.quantized_matmul(x, *w[:3])
    ops.mixed_quantized_matmul(x, [w, w])
    ops.quantized_matmul(x[0], *w[:3])
    assert not extension.calls
    got = ops.mixed_quantized_matmul(x[:1, :16], [w, weight(32, bits=3)])
    assert [y.shape for y in got] == [(1, 16, 64), (1, 16, 32)]
    ops.quantized_matmul(x[:, :8], *w[:3])
    assert extension.calls == {"mixed_quantized_matmul": 1, "quantized_matmul": 1}


def test_what_has_no_metal_kernel_stays(on: Any) -> None:
    extension = on()
    wide = activations(1, 1, 4, 264)
    ops.quantized_attention(wide, wide, wide, k_format=DENSE, v_format=DENSE, scale=0.1)
    x = activations(4, 128)
    ops.linear(x, activations(64, 128))
    ops.compare_logits(x, x + 1)
    assert not extension.calls


def test_rounding_is_that_of_mlx(on: Any) -> None:
    extension = on()
    w = activations(8, 128).astype(mx.float16)
    got = ops.quantize(w, Format("affine", 4, 64))
    assert all(mx.array_equal(a, b) for a, b in zip(got, mx.quantize(w), strict=True))
    extension.calls.clear()
    ops.quantize(w, Format("affine", 4, 64), mx.ones(128))
    assert extension.calls == {"quantize": 1}


def test_the_gradient_of_the_kl_is_that_of_mlx(on: Any) -> None:
    """The forward pass is native, with no gradient of its own on a GPU."""
    on(kl_divergence=lambda out, *a: [mx.stop_gradient(a) for a in out])
    w_p, w_q, h_p = weight(300), weight(300, bits=3), activations(3, 5, 128)
    h_q = h_p + 0.1 * activations(5, 128)
    pull = activations(3, 5)

    def total(kl_of: Callable[..., ops.Comparison]) -> Callable[[mx.array], mx.array]:
        def f(h: mx.array) -> mx.array:
            out = kl_of(h_p, w_p, h, w_q)
            return (out.kl * pull + out.lse_q).sum()

        return f

    got = mx.grad(total(ops.kl_divergence))(h_q)
    expected = mx.grad(total(lambda *sides: kl._tiled(*sides, 0.0)))(h_q)
    assert mx.abs(expected).max() > 1e-2
    assert mx.allclose(got, expected, rtol=1e-3, atol=1e-4)
