"""The parts of a fused decoder block, against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from optiq import ops
from optiq.formats import Format
from optiq.ops import native, reference
from optiq.ops.attention import record_words

EPS = 1e-5
TOLERANCE = 2e-5  # of the largest value: float32 sums of some hundred terms, and exp within 2e-7
ext: Any = native.extension

pytestmark = pytest.mark.skipif(ext is None, reason="no native kernels")


def attend(
    block: Any, h: mx.array, q: mx.array, k: mx.array, v: mx.array, *args: Any, **options: Any
) -> mx.array:
    """With keys and values of the whole batch."""
    out: mx.array = ext.block_attend(block, h, q, [k], [v], *args, **options)
    return out


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def draw(r: np.random.Generator, *shape: int) -> np.ndarray:
    return r.standard_normal(shape, dtype=np.float32)


def close(got: mx.array, truth: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert got.shape == truth.shape
    error = np.abs(np.array(got, dtype=np.float64) - truth).max()
    assert error <= tolerance * np.abs(truth).max(), error / np.abs(truth).max()


def dense(w: np.ndarray, bias: np.ndarray | None = None) -> tuple[Any, ...]:
    return mx.array(w), None, None, 0, 0, None if bias is None else mx.array(bias), None


def heads_of(y: np.ndarray, heads: int) -> np.ndarray:
    """[B, L, heads * dim] -> [B, heads, L, dim]."""
    return y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2)


class Layer:
    """A random attention layer with its float64 truth."""

    def __init__(self, heads: int, kv_heads: int, dim: int, *, packed: bool = False, **more: Any):
        r, self.width = rng(heads, kv_heads, dim), 40
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        rows = [heads * dim, kv_heads * dim, kv_heads * dim]
        self.w = [draw(r, n, self.width) / 6 for n in rows]
        self.b = [draw(r, n) for n in rows] if more.pop("bias", False) else [None] * 3
        self.out = draw(r, self.width, heads * dim) / 6
        if more.pop("silent", False):
            self.out = 0 * self.out  # attention adds nothing
        self.norm = draw(r, self.width)
        self.more = more
        qkv = [dense(w, b) for w, b in zip(self.w, self.b, strict=True)]
        if packed:
            bias = None if self.b[0] is None else np.concatenate(self.b)
            qkv = [dense(np.concatenate(self.w), bias)]
        self.block = ext.DecoderBlock()
        self.block.set_attention(
            qkv=qkv,
            out=dense(self.out),
            heads=heads,
            kv_heads=kv_heads,
            scale=dim**-0.5,
            norm=(mx.array(self.norm), EPS),
            **more,
        )

    def projections(self, h: np.ndarray) -> list[np.ndarray]:
        x = reference.rms_norm(h, self.norm, EPS)
        y = [x @ w.T.astype(np.float64) for w in self.w]
        return [a if b is None else a + b for a, b in zip(y, self.b, strict=True)]

    def attend(self, h: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        y = reference.attention(*args, scale=self.dim**-0.5, **kwargs)
        return h + y.swapaxes(1, 2).reshape(*h.shape[:2], -1) @ self.out.T.astype(np.float64)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 3), (1, 130)])
def test_projections(batch: int, rows: int, bias: bool, packed: bool) -> None:
    layer = Layer(6, 2, 24, packed=packed, bias=bias)
    h = draw(rng(1), batch, rows, 40)
    got = ext.block_project(layer.block, mx.array(h))
    for a, y, n in zip(got, layer.projections(h), (6, 2, 2), strict=True):
        close(a, heads_of(y, n))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dim", [16, 24])
def test_head_norms(dim: int, whole: bool) -> None:
    r = rng(7)
    q, k = (draw(r, (n if whole else 1) * dim) for n in (6, 2))
    layer = Layer(
        6,
        2,
        dim,
        q_norm=(mx.array(q), EPS),
        k_norm=(mx.array(k), EPS),
        v_norm=(None, EPS),
        whole_norm=whole,
    )
    h = draw(rng(2), 2, 5, 40)
    y = layer.projections(h)
    if whole:
        truth = [
            heads_of(reference.rms_norm(a, w, EPS), n)
            for a, w, n in zip(y, (q, k), (6, 2), strict=False)
        ]
    else:
        truth = [
            reference.rms_norm(heads_of(a, n), w, EPS)
            for a, w, n in zip(y, (q, k), (6, 2), strict=False)
        ]
    truth.append(reference.rms_norm(heads_of(y[2], 2), None, EPS))
    for a, b in zip(ext.block_project(layer.block, mx.array(h)), truth, strict=True):
        close(a, b)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [2, 10, 24])
@pytest.mark.parametrize("offset", [0, 3, 100_000])
def test_rotations(dims: int, traditional: bool, offset: int) -> None:
    frequencies = [10000.0 ** (-2 * i / dims) for i in range(dims // 2)]
    layer = Layer(4, 1, 24, rope=(dims, traditional, frequencies, 1.25))
    h = draw(rng(3), 2, 4, 40)
    turned = [
        reference.rotate(heads_of(y, n), offset + np.arange(4), frequencies, traditional, 1.25)
        for y, n in zip(layer.projections(h), (4, 1), strict=False)
    ]
    got = ext.block_project(layer.block, mx.array(h), offset)
    for a, b in zip(got, turned, strict=False):
        close(a, b)
    each = ext.block_project(layer.block, mx.array(h), 0, mx.array([offset, offset]))
    assert all(mx.array_equal(a, b) for a, b in zip(got, each, strict=True))


CASES = [(1, 1, 1), (1, 1, 37), (2, 1, 300), (2, 5, 5), (1, 5, 140), (1, 130, 130), (1, 40, 300)]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (20, 1)], ids=str)
@pytest.mark.parametrize("dim", [8, 40, 64])
@pytest.mark.parametrize(("batch", "rows", "keys"), CASES)
def test_attention(batch: int, rows: int, keys: int, dim: int, heads: tuple[int, int]) -> None:
    layer = Layer(*heads, dim)
    r = rng(batch, rows, keys)
    h, q = draw(r, batch, rows, 40), draw(r, batch, heads[0], rows, dim)
    k, v = (draw(r, batch, heads[1], keys, dim) for _ in range(2))
    arrays = [mx.array(a) for a in (h, q, k, v)]
    close(attend(layer.block, *arrays, ""), layer.attend(h, q, k, v))
    truth = layer.attend(h, q, k, v, mask="causal")
    close(attend(layer.block, *arrays, "causal"), truth)


@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 1, 5, 37), (2, 6, 5, 37), (2, 1, 1, 37)])
@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
def test_masks(shape: tuple[int, ...], kind: str) -> None:
    layer, r = Layer(6, 2, 16), rng(4)
    h, q = draw(r, 2, 5, 40), draw(r, 2, 6, 5, 16)
    k, v = (draw(r, 2, 2, 37, 16) for _ in range(2))
    mask = mx.array(r.random(shape) < 0.6)
    mask = mask if kind == "bool" else mx.where(mask, 0.5, -mx.inf).astype(getattr(mx, kind))
    given = np.array(mask if kind == "bool" else mask.astype(mx.float32))
    got = attend(layer.block, *map(mx.array, (h, q, k, v)), "array", mask)
    close(got, layer.attend(h, q, k, v, mask=given))


def test_a_row_that_sees_nothing_is_as_in_mlx() -> None:
    """Left padding makes such rows; the result is not used, but must not be NaN."""
    layer, r = Layer(6, 2, 16), rng(5)
    arrays = [mx.array(draw(r, *s)) for s in ((1, 2, 40), (1, 6, 2, 16), *[(1, 2, 200, 16)] * 2)]
    mask = mx.zeros((2, 200), dtype=mx.bool_)
    got = attend(layer.block, *arrays, "array", mask)
    y = mx.fast.scaled_dot_product_attention(*arrays[1:], scale=0.25, mask=mask)
    expected = arrays[0] + y.swapaxes(1, 2).reshape(1, 2, -1) @ mx.array(layer.out).T
    close(got, np.array(expected, dtype=np.float64))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_caches_by_strides(dtype: mx.Dtype) -> None:
    layer, r = Layer(6, 2, 16), rng(6)
    h, q = draw(r, 2, 1, 40), draw(r, 2, 6, 1, 16)
    k, v = (mx.array(draw(r, 2, 2, 64, 16)).astype(dtype)[..., :50, :] for _ in range(2))
    truth = layer.attend(h, q, *(np.array(a.astype(mx.float32)) for a in (k, v)))
    close(attend(layer.block, mx.array(h), mx.array(q), k, v, ""), truth)


def test_sinks_and_softcap() -> None:
    r = rng(8)
    sinks = 3 * draw(r, 6)
    layer = Layer(6, 2, 16, sinks=mx.array(sinks), softcap=2.0)
    h, q = draw(r, 1, 3, 40), 5 * draw(r, 1, 6, 3, 16)
    k, v = (draw(r, 1, 2, 200, 16) for _ in range(2))
    truth = layer.attend(h, q, k, v, mask="causal", sinks=sinks, softcap=2.0)
    close(attend(layer.block, *map(mx.array, (h, q, k, v)), "causal"), truth)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_mlp(rows: int, post: bool, packed: bool, activation: str) -> None:
    r = rng(rows)
    gate, up, down = draw(r, 52, 40) / 6, draw(r, 52, 40) / 6, draw(r, 40, 52) / 6
    biases = [draw(r, 52), draw(r, 52), draw(r, 40)]
    norm, h = draw(r, 40), 4 * draw(r, 1, rows, 40)
    parts = [dense(gate, biases[0]), dense(up, biases[1])]
    if packed:
        parts = [dense(np.concatenate([gate, up]), np.concatenate(biases[:2]))]
    block = Layer(2, 1, 16, silent=True).block
    block.set_mlp(
        gate_up=parts,
        down=dense(down, biases[2]),
        activation=activation,
        norm=(mx.array(norm), EPS),
        post_norm=(mx.array(norm), EPS) if post else None,
        gain=0.5,
    )
    x = reference.rms_norm(h, norm, EPS)
    y = reference.gated(x @ gate.T + biases[0], x @ up.T + biases[1], activation)
    y = y @ down.T + biases[2]
    y = reference.rms_norm(y, norm, EPS) if post else y
    got, *_ = ext.block_step(block, mx.array(h), [], [], [(0, rows, 0, rows)], "", mlp=True)
    close(got, h + 0.5 * y)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """A token decoded alone, in a batch or in a prompt is bit-equal: near ties do not move."""
    layer, r = Layer(6, 2, 16), rng(9)
    h = mx.array(draw(r, 4, 3, 40))  # up to 16 rows, as the products promise
    q = ext.block_project(layer.block, h)[0]
    k, v = (mx.array(draw(r, 4, 2, 300, 16)) for _ in range(2))
    together = attend(layer.block, h, q, k, v, "causal")
    for b in range(4):
        one = [a[b : b + 1] for a in (h[:, 2:], q[:, :, 2:], k, v)]
        assert mx.array_equal(attend(layer.block, *one, ""), together[b : b + 1, 2:])


def test_a_cache_is_reused_unless_somebody_else_holds_it() -> None:
    layer, r = Layer(4, 2, 16), rng(10)
    h = mx.array(draw(r, 1, 1, 40))
    keys, values = mx.zeros((1, 2, 8, 16)), mx.zeros((1, 2, 8, 16))
    mx.eval(h, keys, values)
    kept = keys
    _, new_keys, new_values = ext.block_step(layer.block, h, [keys], [values], [(3, 4, 3, 1)], "")
    mx.eval(new_keys)
    assert not mx.any(kept)  # the one that is held is as it was
    k = ext.block_project(layer.block, h, 3)[1]
    assert mx.array_equal(new_keys[:, :, 3:4], k)
    assert not mx.any(new_keys[:, :, :3])
    view, before = new_keys[..., :4, :], np.array(new_keys)
    mx.eval(view)
    _, newer, _ = ext.block_step(layer.block, h, [new_keys], [new_values], [(4, 5, 4, 1)], "")
    del new_keys
    mx.eval(newer)
    assert np.array_equal(np.array(view), before[:, :, :4])


def scheduled_behind(work: mx.array, h: mx.array) -> mx.array:
    """`h`, which is not there before `work` is done."""
    return h + 0.0 * work.sum()


def test_a_cache_is_reused_while_the_step_that_gave_it_is_still_to_run() -> None:
    """As in generation, where a token is scheduled before the last one is there."""
    layer, r = Layer(4, 2, 16), rng(14)
    h = mx.array(draw(r, 1, 1, 40))
    keys, values = mx.zeros((1, 2, 100_000, 16)), mx.zeros((1, 2, 100_000, 16))
    work = mx.array(draw(r, 1500, 1500))
    mx.eval(h, keys, values, work)
    held, nbytes = mx.get_active_memory(), keys.nbytes
    mx.reset_peak_memory()
    x, expected = scheduled_behind(work @ work, h), []
    for i in range(6):
        expected.append(ext.block_project(layer.block, x, i)[1])
        x, keys, values = ext.block_step(layer.block, x, [keys], [values], [(i, i + 1, i, 1)], "")
        mx.async_eval(x, expected[-1])
    mx.eval(x)
    assert mx.get_peak_memory() - held - 2 * work.nbytes < nbytes  # no copy of either
    assert mx.array_equal(keys[:, :, :6], mx.concatenate(expected, axis=2))


@pytest.mark.parametrize("holder", ["name", "view", "scheduled view"])
def test_what_is_held_stays_while_the_step_that_gave_it_is_still_to_run(holder: str) -> None:
    layer, r = Layer(4, 2, 16), rng(15)
    h = mx.array(draw(r, 1, 1, 40))
    keys, values = mx.zeros((1, 2, 8, 16)), mx.zeros((1, 2, 8, 16))
    work = mx.array(draw(r, 1500, 1500))
    mx.eval(h, keys, values, work)
    expected = ext.block_project(layer.block, h, 3)[1]
    x = scheduled_behind(work @ work, h)
    x, keys, values = ext.block_step(layer.block, x, [keys], [values], [(3, 4, 3, 1)], "")
    mx.async_eval(x)
    held = keys if holder == "name" else keys[:, :, :6]
    if holder == "scheduled view":
        mx.async_eval(held)
    for i in (4, 5):
        x, keys, values = ext.block_step(layer.block, x, [keys], [values], [(i, i + 1, i, 1)], "")
        mx.async_eval(x)
    assert mx.any(keys[:, :, 5])
    assert mx.allclose(held[:, :, 3:4], expected)
    assert not mx.any(held[:, :, 4:])


K, V = Format("affine", 5, 32), Format("affine", 4, 64)
PACKED = {"k_format": (32, 5), "v_format": (64, 4)}


def empty_records(batch: int, kv_heads: int, rows: int, dim: int) -> list[mx.array]:
    shapes = [(batch, kv_heads, rows, record_words(dim, fmt)) for fmt in (K, V)]
    return [mx.zeros(shape, dtype=mx.uint32) for shape in shapes]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_with_records(batch: int, rows: int) -> None:
    """New rows are quantized into the cache and read from it like the others."""
    layer, r = Layer(6, 2, 24), rng(11)
    h = mx.array(draw(r, batch, rows, 40))
    before = [ops.quantize_kv(mx.array(draw(r, batch, 2, 200, 24)), fmt) for fmt in (K, V)]
    q, k, v = ext.block_project(layer.block, h, 150)
    expected = [mx.array(x) for x in before]
    for x, new, fmt in zip(expected, (k, v), (K, V), strict=True):
        x[:, :, 150 : 150 + rows] = ops.quantize_kv(new, fmt)
    length = 150 + rows
    out, *caches = ext.block_step(
        layer.block, h, before[:1], before[1:], [(150, length, 150, rows)], "causal", None, False,
        *PACKED.values(),
    )  # fmt: skip
    seen = [x[:, :, :length] for x in expected]
    assert all(mx.array_equal(a, b) for a, b in zip(caches, expected, strict=True))
    assert mx.array_equal(attend(layer.block, h, q, *seen, "causal", None, False, **PACKED), out)
    exact = [
        reference.dequantize_kv(np.array(x), 24, fmt.group_size, fmt.bits)
        for x, fmt in zip(seen, (K, V), strict=True)
    ]
    close(out, layer.attend(np.array(h), np.array(q), *exact, mask="causal"))


def test_a_cache_of_records_is_reused_unless_somebody_else_holds_it() -> None:
    layer, r = Layer(4, 2, 16), rng(12)
    h = mx.array(draw(r, 1, 1, 40))
    keys, values = empty_records(1, 2, 8, 16)
    mx.eval(h, keys, values)
    kept, address = keys, np.array(values, copy=False).ctypes.data
    arguments = ([(3, 4, 3, 1)], "", None, False, *PACKED.values())
    _, new_keys, new_values = ext.block_step(layer.block, h, [keys], [values], *arguments)
    del keys, values
    mx.eval(new_keys, new_values)
    assert not mx.any(kept)  # the one that is held is as it was
    assert mx.any(new_keys[:, :, 3])
    assert np.array(new_values, copy=False).ctypes.data == address


def test_records_with_starts_window_and_exact_vectors() -> None:
    layer, r = Layer(6, 2, 24), rng(13)
    h, q = draw(r, 2, 2, 40), draw(r, 2, 6, 2, 24)
    plain = [draw(r, 2, 2, 90, 24) for _ in range(2)]
    records = [ops.quantize_kv(mx.array(x), fmt) for x, fmt in zip(plain, (K, V), strict=True)]
    exact = [
        reference.dequantize_kv(np.array(x), 24, fmt.group_size, fmt.bits)
        for x, fmt in zip(records, (K, V), strict=True)
    ]
    for stored, own in zip(exact, plain, strict=True):
        stored[0, :, :3], stored[1, :, 20:23] = own[0, :, :3], own[1, :, 20:23]
        stored[:, :, -5:] = own[:, :, -5:]
    first = tuple(mx.array(np.stack([x[0, :, :3], x[1, :, 20:23]])) for x in plain)
    recent = tuple(mx.array(x[:, :, -5:]) for x in plain)
    query, key = np.arange(88, 90)[:, None], np.arange(90)
    mask = (key <= query) & (key > query - 80)
    mask = mask & (key >= np.array([0, 20])[:, None, None, None])
    got = attend(
        layer.block,
        *map(mx.array, (h, q)),
        *records,
        "causal",
        **PACKED,
        window=80,
        starts=mx.array([0, 20]),
        first=first,
        recent=recent,
    )
    close(got, layer.attend(h, q, *exact, mask=mask))


def quantized_out(bits: int = 4, inner: int = 64) -> tuple[Any, ...]:
    """An output projection of 4 bits from 64 values, which is also called one of other sizes."""
    scales = mx.zeros((40, inner // 64))
    return mx.zeros((40, 8), mx.uint32), scales, scales, 64, bits, None, None


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"heads": 5}, "do not divide"),
        ({"kv_heads": 1}, "rows for"),
        ({"norm": (mx.zeros(3), EPS)}, "input norm"),
        ({"q_norm": (mx.zeros(3), EPS)}, "query norm"),
        ({"rope": (4, False, [1.0], 1.0)}, "rotation of 4"),
        ({"sinks": mx.zeros(3)}, "sinks"),
        ({"qkv": [dense(np.zeros((8, 40), np.float32))]}, "projections have 8 rows"),
        (
            {"out": (mx.zeros((40, 8), mx.uint32), mx.zeros((40, 1)), None, 64, 4, None, None)},
            "no biases",
        ),
        ({"out": quantized_out(bits=7)}, "the output projection: bits is 7"),
        ({"out": quantized_out(inner=128)}, "the output projection: w is .* need codes"),
    ],
)
def test_wrong_weights_are_named(change: dict[str, Any], names: str) -> None:
    w = [dense(np.zeros((n, 40), np.float32)) for n in (64, 32, 32)]
    good = {"qkv": w, "out": dense(np.zeros((40, 64), np.float32))}
    good |= {"heads": 4, "kv_heads": 2, "scale": 1.0}
    ext.DecoderBlock().set_attention(**good)
    with pytest.raises(ValueError, match=names):
        ext.DecoderBlock().set_attention(**{**good, **change})


def test_wrong_input_is_named() -> None:
    block, h = Layer(4, 2, 16).block, mx.zeros((1, 2, 40))
    q, k = mx.zeros((1, 4, 2, 16)), mx.zeros((1, 2, 5, 16))
    with pytest.raises(ValueError, match="h is"):
        ext.block_project(block, h[..., :8])
    with pytest.raises(ValueError, match="float32"):
        ext.block_project(block, h.astype(mx.bfloat16))
    with pytest.raises(ValueError, match="offsets"):
        ext.block_project(block, h, 0, mx.array([1, 2]))
    with pytest.raises(ValueError, match="q is"):
        attend(block, h, q[:, :2], k, k, "")
    with pytest.raises(ValueError, match="do not fit a batch of 1 and 2 key heads of 16"):
        attend(block, h, q, k[:, :1], k, "")
    with pytest.raises(ValueError, match="does not broadcast"):
        attend(block, h, q, k, k, "array", mx.zeros((3, 5)))
    with pytest.raises(ValueError, match="masking is"):
        attend(block, h, q, k, k, "caudal")
    with pytest.raises(ValueError, match="do not fit a cache"):
        ext.block_step(block, h, [k], [k], [(4, 6, 4, 2)], "")
    keys, values = empty_records(1, 2, 8, 16)
    at = [(3, 5, 3, 2)]
    with pytest.raises(ValueError, match="must be float32, float16 or uint32 records"):
        ext.block_step(block, h, [k.astype(mx.bfloat16)], [k.astype(mx.bfloat16)], at, "")
    with pytest.raises(ValueError, match="in records of 5 words"):
        ext.block_step(block, h, [keys], [values], at, "", None, False, (32, 8), (64, 4))
    with pytest.raises(ValueError, match="keys: bits is 7"):
        ext.block_step(block, h, [keys], [values], at, "", None, False, (32, 7), (64, 4))
    with pytest.raises(ValueError, match="no MLP"):
        attend(block, h, q, k, k, "", mlp=True)


@pytest.mark.parametrize("formats", [None, (K, V)])
def test_rows_with_caches_of_their_own_are_as_alone(formats: Any) -> None:
    """A row for each cache, and three for the last one."""
    layer, r = Layer(6, 2, 24), rng(21)
    h = mx.array(draw(r, 8, 1, 40))
    places = [(start, start + 1, start, 1) for start in (0, 3, 130, 299, 20)]
    places.append((140, 143, 140, 3))
    packed = PACKED.values() if formats else ()

    def caches() -> list[list[mx.array]]:
        own = rng(22)
        made = [[mx.array(draw(own, 1, 2, 300, 24)) for _ in range(2)] for _ in places]
        if formats:
            made = [
                [ops.quantize_kv(x, f) for x, f in zip(pair, formats, strict=True)] for pair in made
            ]
        return made

    pairs = caches()
    together, *stored = ext.block_step(
        layer.block,
        h,
        [k for k, _ in pairs],
        [v for _, v in pairs],
        places,
        "",
        None,
        False,
        *packed,
    )
    for i, (k, v) in enumerate(caches()):
        rows = h[i:].reshape(1, -1, 40) if i == 5 else h[i : i + 1]
        masking = "causal" if i == 5 else ""
        out, *own = ext.block_step(
            layer.block, rows, [k], [v], places[i : i + 1], masking, None, False, *packed
        )
        got = together[i : i + len(rows[0])].reshape(rows.shape)
        assert mx.array_equal(got, out), i
        kept = zip(stored[2 * i : 2 * i + 2], own, strict=True)
        assert all(mx.array_equal(a, b) for a, b in kept)
    if not formats:  # what a block that shares keys and values does
        single = places[:5]
        q = ext.block_project(layer.block, h[:5], 0, mx.array([p[2] for p in single]))[0]
        seen = [
            [x[:, :, : p[1]] for x, p in zip(stored[i:10:2], single, strict=True)] for i in (0, 1)
        ]
        again = ext.block_attend(layer.block, h[:5], q, *seen, "", None, False)
        assert mx.array_equal(again, together[:5])


def test_rows_of_one_cache_are_as_one_sequence() -> None:
    layer, r = Layer(6, 2, 24), rng(24)
    h = mx.array(draw(r, 3, 1, 40))
    k, v = (mx.array(draw(r, 1, 2, 60, 24)) for _ in range(2))
    place = [(40, 43, 40, 3)]
    rows = ext.block_step(layer.block, h, [k + 0], [v + 0], place, "")
    one = ext.block_step(layer.block, h.reshape(1, 3, 40), [k + 0], [v + 0], place, "causal")
    assert mx.array_equal(rows[0].reshape(1, 3, 40), one[0])
    assert all(mx.array_equal(a, b) for a, b in zip(rows[1:], one[1:], strict=True))


def test_rows_with_caches_of_their_own_that_do_not_fit_are_refused() -> None:
    layer, r = Layer(4, 2, 16), rng(23)
    h = mx.array(draw(r, 3, 1, 40))
    cache = mx.zeros((1, 2, 8, 16))
    place = (0, 1, 0, 1)
    with pytest.raises(ValueError, match="2 places with 2 rows do not fit h"):
        ext.block_step(layer.block, h, [cache] * 2, [cache] * 2, [place] * 2, "")
    with pytest.raises(ValueError, match="caches of keys"):
        ext.block_step(layer.block, h, [cache] * 3, [cache] * 2, [place] * 3, "")
    with pytest.raises(ValueError, match="mask does not go"):
        ext.block_step(
            layer.block, h, [cache] * 3, [cache] * 3, [place] * 3, "array", mx.zeros((1, 1))
        )
    with pytest.raises(ValueError, match="do not fit a cache"):
        ext.block_step(layer.block, h, [cache] * 3, [cache] * 3, [place, place, (8, 9, 8, 1)], "")
