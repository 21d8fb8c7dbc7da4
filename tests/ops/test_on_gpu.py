"""What goes to the Metal kernels on a GPU, with a CPU that says it is one: the kernels that run
are those of the CPU, the decisions are real. On a Mac, tests/metal/test_on_gpu.py asks the GPU."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import mlx.core as mx
import pytest

from optiq import ops
from optiq.formats import DENSE, Format
from optiq.ops import AffineWeight, kl, native, trials
from optiq.ops.cases import Terms
from optiq.ops.decode_layer import DecodeLayer
from optiq.ops.layer_cases import LayerCase
from optiq.ops.trials import TRIALS, passes

from . import layer_stand_in

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
            if name == "traced":
                return REAL.traced(*args)
            if name == "DecodeLayer":
                return layer_stand_in.Described(REAL.DecodeLayer(**kwargs), kwargs)
            self.calls[name] += 1
            has = layer_stand_in if name == "decode_layer" else REAL
            out = getattr(has, name)(*args, **kwargs)
            return self.faults[name](out, *args, **kwargs) if name in self.faults else out

        return call


REAL = native.extension


def on_device(patch: pytest.MonkeyPatch, extension: Extension, device: str = "metal") -> None:
    """Puts the process on a device, by name, with all kernels that are right: the times are those
    of a CPU. Trials of many rows are as small as the others."""
    patch.setattr(native, "device", lambda: device)
    patch.setattr(native, "extension", extension)
    patch.setattr(trials, "WIDE", 192)
    patch.setenv("OPTIQ_METAL", "1")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Extension]:
    """Puts the process on a device, by name."""

    def put(device: str = "metal", **faults: Fault) -> Extension:
        extension = Extension(**faults)
        on_device(monkeypatch, extension, device)
        return extension

    return put


def weight(out: int = 64, inner: int = 128, bits: int = 4) -> AffineWeight:
    dense = mx.random.normal((out, inner), key=mx.random.key(out))
    return AffineWeight(*mx.quantize(dense, 64, bits), 64, bits)


def activations(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(7))


X, A, B, SLOTS = Terms(4, 128, 40, 8).inputs()
TERMS = ops.LowRankTerms(4, 128, 40)
mx.eval(A, B)
for slot in (1, 2, 3):
    pair = A[slot] + 0, B[slot] + 0
    mx.eval(pair)
    TERMS.put(slot, pair)


def layer_step() -> list[mx.array]:
    """As who has a layer runs it."""
    case = LayerCase(dtype="f32")
    given = {f.name: getattr(case.layer, f.name) for f in fields(case.layer)}
    described = layer_stand_in.Described(None, given | {"k_format": (0, 0), "v_format": (0, 0)})

    def stock(x: mx.array, keys: mx.array, values: mx.array, at: Any, *_: Any) -> mx.array:
        return layer_stand_in.decode_layer(described, x, keys, values, at)[0]

    step = case.h, *case.caches, case.place
    ours = DecodeLayer(case.layer, stock).step(*step, case.formats)
    return layer_stand_in.decode_layer(described, *step) if ours is None else ours


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
        "gathered_low_rank": lambda: [ops.gathered_low_rank(X, TERMS, [1, 0, 3, 2])],
        "decode_layer": layer_step,
    }


def close(got: Any, expected: Any) -> bool:
    return all(
        mx.allclose(a, b, rtol=1e-3, atol=1e-3).item() for a, b in zip(got, expected, strict=True)
    )


def raised_later(y: mx.array) -> mx.array:
    """An array like `y` whose evaluation raises, as one of a kernel that does not compile."""
    halves = mx.zeros((1, 1, 1), dtype=mx.float16)
    return y + mx.gather_mm(halves, halves, rhs_indices=mx.array([0])).sum().astype(y.dtype)


def broken(how: str) -> Fault:
    """What goes wrong with a launch: in Python or C++ at once, in mx.eval, or in the result."""

    def each(a: mx.array) -> mx.array:
        return raised_later(a) if how == "raises in eval" else (a * 1.1).astype(a.dtype)

    def fault(out: Any, *args: Any, **kwargs: Any) -> Any:
        if how == "raises":
            raise RuntimeError("no such function")
        return each(out) if isinstance(out, mx.array) else [each(a) for a in out]

    return fault


HOW = ("raises", "raises in eval", "wrong")


def test_an_array_can_raise_in_eval() -> None:
    y = raised_later(mx.zeros(3))
    with pytest.raises(RuntimeError, match="float32"):
        mx.eval(y)


@pytest.mark.parametrize("op", TRIALS)
def test_a_launch_is_tried_once_and_then_native(op: str, on: Any) -> None:
    extension = on()
    first = work()[op]()
    assert sum(extension.calls.values()) > 1
    extension.calls.clear()
    assert close(work()[op](), first)
    assert extension.calls == {op: 1}


@pytest.mark.parametrize("op", TRIALS)
@pytest.mark.parametrize("how", HOW)
def test_where_a_trial_fails_mlx_runs_and_one_warning_says_so(op: str, how: str, on: Any) -> None:
    expected = work()[op]()
    extension = on(**{op: broken(how)})
    with pytest.warns(RuntimeWarning, match=f"Metal kernel for {op} is left alone.*selftest"):
        assert close(work()[op](), expected)
    extension.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(work()[op](), expected)
    assert not extension.calls


@pytest.mark.parametrize("op", TRIALS)
def test_a_launch_that_raises_later_is_left_to_mlx_from_then_on(op: str, on: Any) -> None:
    expected = work()[op]()
    extension = on()
    work()[op]()
    extension.faults[op] = broken("raises")
    with pytest.warns(RuntimeWarning, match=f"Metal kernel for {op} is left alone.*no such") as w:
        assert close(work()[op](), expected)
    assert len(w) == 1
    extension.calls.clear()
    assert close(work()[op](), expected)
    assert not extension.calls


@pytest.mark.parametrize("how", HOW)
def test_the_other_launches_of_an_op_stay(how: str, on: Any) -> None:
    fault = broken(how)
    extension = on(
        quantize=lambda out, w, c, *a: out if c is None else fault(out),
        quantized_matmul=lambda y, x, *a, **k: fault(y) if x.shape[0] == 3 else y,
    )
    x, w, form = activations(4, 128), weight(), Format("affine", 4, 64)

    def search() -> None:
        ops.quantize(x, form, mx.ones(128))

    def three_rows() -> None:
        got = ops.quantized_matmul(x[:3], *w[:3])
        assert close([got], [mx.quantized_matmul(x[:3], *w[:3])])

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        search()
        three_rows()
        ops.quantized_matmul(x[:3].astype(mx.float16), *w[:3])
    assert len(warned) == 1  # for both
    extension.calls.clear()
    search()
    three_rows()
    assert not extension.calls
    ops.quantize(x, form)
    ops.quantized_matmul(x, *w[:3])
    assert set(extension.calls) == {"quantize", "quantized_matmul"}


def test_wrong_arguments_are_no_fault_of_the_kernels(on: Any) -> None:
    extension = on()
    x, w = activations(4, 128), weight()
    ops.quantized_matmul(x, *w[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"quantized_matmul"):
            ops.quantized_matmul(x[:, :64], *w[:3])
    extension.calls.clear()
    ops.quantized_matmul(x, *w[:3])
    assert extension.calls


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


F32, F16 = mx.float32, mx.float16
FOUR, K8 = (F32, 64, 4), Format("affine", 8, 64)
W4 = Format("affine", 4, 64)
LAYER = (F32, F32, 1, 32, 2, K8, K8, False, (W4,) * 3, (W4,), (W4,) * 2, (W4,))
# What is wrong -> the launch that must not be used then, the function, and what it makes of its
# result.
FAULTS: dict[str, tuple[str, tuple[Any, ...], str, Fault]] = {
    "one row": (
        "quantized_matmul",
        ("one", F16, 1, FOUR),
        "quantized_matmul",
        lambda y, x, *a, **k: scaled(y) if x.shape[0] == 1 else y,
    ),
    "the last of sixteen rows": (
        "quantized_matmul",
        ("one", F32, 16, FOUR),
        "quantized_matmul",
        lambda y, x, *a, **k: y.at[15].add(1) if x.shape[0] == 16 else y,
    ),
    "not transposed": (
        "quantized_matmul",
        ("not transposed", F32, 2, FOUR),
        "quantized_matmul",
        lambda y, x, w, scales, biases, transpose, *a, **k: y if transpose else scaled(y),
    ),
    "experts": (
        "quantized_matmul",
        ("experts", F32, 2, FOUR),
        "quantized_matmul",
        lambda y, *a, indices=None, **k: y if indices is None else y[::-1],
    ),
    "the last of many experts": (
        "quantized_matmul",
        ("sorted experts", F32, 64, FOUR),
        "quantized_matmul",
        lambda y, *a, sorted_indices=False, **k: y.at[-1].add(1) if sorted_indices else y,
    ),
    "several": (
        "quantized_matmul",
        ("several", F32, 1, FOUR, (F32, 64, 3)),
        "mixed_quantized_matmul",
        lambda y, *a: [y[0], scaled(y[1])],
    ),
    "not a number": (
        "quantized_matmul",
        ("one", F32, 2, FOUR),
        "quantized_matmul",
        lambda y, *a, **k: y * mx.nan,
    ),
    "codes": (
        "quantize",
        ("min/max", F16, 64, 6),
        "quantize",
        lambda out, *a: [out[0] ^ 1, *out[1:]],
    ),
    "scales of the search": (
        "quantize",
        ("search", F16, 64, 6),
        "quantize",
        lambda out, w, importance, *a: (
            out if importance is None else [out[0], scaled(out[1]), out[2]]
        ),
    ),
    "kl": (
        "kl_divergence",
        ((F16, 0, 0), FOUR),
        "kl_divergence",
        lambda out, *a: [scaled(out[0]), *out[1:]],
    ),
    "agreement": (
        "kl_divergence",
        ((F16, 0, 0), FOUR),
        "kl_divergence",
        lambda out, *a: [out[0], ~out[1], *out[2:]],
    ),
    "lse_q": (
        "kl_divergence",
        ((F16, 0, 0), FOUR),
        "kl_divergence",
        lambda out, *a: [*out[:3], scaled(out[3])],
    ),
    "records": ("quantize_kv", (F16, 80, K8), "quantize_kv", lambda out, *a: out ^ 1),
    "a decode step": (
        "quantized_attention",
        (F32, 64, 64, K8, K8, 3),
        "quantized_attention",
        lambda y, q, *a, **k: scaled(y) if q.shape[2] == 1 else y,
    ),
    "prefill": (
        "quantized_attention",
        (F32, 64, 64, K8, K8, 0),
        "quantized_attention",
        lambda y, q, *a, **k: y.at[:, :, 32:].multiply(1.01) if q.shape[2] > 1 else y,
    ),
    "padding": (
        "quantized_attention",
        (F32, 64, 64, K8, K8, 8),
        "quantized_attention",
        lambda y, *a, starts, **k: REAL.quantized_attention(*a),
    ),
    "a layer's output": (
        "decode_layer",
        LAYER,
        "decode_layer",
        lambda out, *a: [scaled(out[0]), *out[1:]],
    ),
    "a layer's values": (
        "decode_layer",
        LAYER,
        "decode_layer",
        lambda out, *a: [*out[:2], out[2] ^ 1],
    ),
    "a layer with keys in another place": (
        "decode_layer",
        LAYER,
        "decode_layer",
        lambda out, layer, h, k, v, place: [out[0], mx.roll(out[1], 1, axis=2), out[2]],
    ),
    "another's term": (
        "gathered_low_rank",
        (F16,),
        "gathered_low_rank",
        lambda y, x, a, b, slots: REAL.gathered_low_rank(x, a, b, slots[::-1]),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_trials_notice(fault: str) -> None:
    op, launch, function, change = FAULTS[fault]
    assert passes(Extension(), op, launch)
    assert not passes(Extension(**{function: change}), op, launch)


def test_many_rows(on: Any) -> None:
    """There are kernels for a plain product and for sorted experts. Without transposing, of experts
    in disorder and under a gradient stock MLX computes them, and of nothing."""
    extension = on()
    w, x = weight(), activations(2, 17, 128)
    experts = [mx.stack([a, a]) for a in w[:3]]
    ops.quantized_matmul(activations(17, 64), *w[:3], transpose=False)
    which = {"indices": mx.zeros(17, dtype=mx.uint32)}
    ops.quantized_matmul(x[0], *experts, **which)
    in_order = which | {"sorted_indices": True}
    mx.grad(lambda x: ops.quantized_matmul(x, *experts, **in_order).sum())(x[0])
    mx.grad(lambda x: ops.quantized_matmul(x, *w[:3]).sum())(x)
    mx.grad(lambda x: ops.mixed_quantized_matmul(x, [w, w])[1].sum())(x)
    ops.quantized_matmul(x[:, :0], *w[:3])
    assert not extension.calls
    for _ in range(2):  # with a trial and a contest, then without
        extension.calls.clear()
        got = ops.quantized_matmul(x[0], *experts, **in_order)
    assert extension.calls == {"quantized_matmul": 1}
    assert close([got], [mx.quantized_matmul(x[0], *w[:3])])
    for rows in (34, 16):
        for _ in range(2):  # with trials, then without
            extension.calls.clear()
            got = ops.mixed_quantized_matmul(x.flatten(0, 1)[None, :rows], [w, weight(32, bits=3)])
            ops.quantized_matmul(x.flatten(0, 1)[:rows], *w[:3])
        assert [y.shape for y in got] == [(1, rows, 64), (1, rows, 32)]
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
    for _ in range(2):
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
