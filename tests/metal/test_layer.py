"""A decoder layer in few launches, as planned and run on the emulator, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from optiq.formats import DENSE, Format
from optiq.ops import reference
from optiq.ops.attention import packing, quantize_kv
from optiq.ops.cases import DTYPES, EPS, f64
from optiq.ops.reference import Float64
from tests.msl.emulator import Counters, needs_emulator

from .launcher import (
    NAMES,
    NUMPY,
    Plan,
    compile_together,
    plan_decode_layer,
    run_arrays,
    to_mlx,
    to_numpy,
)

pytestmark = needs_emulator

DIM, WIDTH, HIDDEN, HEADS, KV_HEADS = 32, 96, 160, 6, 2
EPSILON = 1e-5
ROOM = 40  # tokens of a cache
K8, V4 = Format("affine", 8, 32), Format("affine", 4, 32)


def decoded(cache: mx.array, fmt: Format) -> Float64:
    return (
        f64(cache) if fmt == DENSE else reference.dequantize_kv(np.array(cache), DIM, *packing(fmt))
    )


@dataclass(frozen=True)
class Layer:
    """Of a family: what of it is there."""

    name: str
    bits: tuple[int, ...] = (4, 6, 8, 3, 4, 5, 2)  # q, k, v, out, gate, up, down
    dtype: str = "f16"
    batch: int = 1
    keys: int = 21  # with the new one
    formats: tuple[Format, Format] = (DENSE, DENSE)
    head_norms: bool = False
    post_norms: bool = False
    bias: bool = False
    gelu: bool = False
    joined: bool = False  # q, k, v in one weight, and gate, up in another
    traditional: bool = False
    gain: float = 1.0

    def __str__(self) -> str:
        return self.name

    def normal(self, key: int, *shape: int, scale: float = 1.0) -> mx.array:
        return (scale * mx.random.normal(shape, key=mx.random.key(key))).astype(DTYPES[self.dtype])

    def vector(self, key: int, n: int) -> mx.array:
        return 1 + 0.1 * mx.random.normal((n,), key=mx.random.key(key))

    @cached_property
    def weights(self) -> list[tuple[int, tuple[int, int], list[mx.array]]]:
        """Rows, group size and bits, arrays."""
        q, kv = HEADS * DIM, KV_HEADS * DIM
        rows = [q, kv, kv, WIDTH, HIDDEN, HIDDEN, WIDTH]
        columns = [WIDTH, WIDTH, WIDTH, q, WIDTH, WIDTH, HIDDEN]
        bits = list(self.bits)
        if self.joined:
            rows, columns = [q + 2 * kv, WIDTH, 2 * HIDDEN, WIDTH], [WIDTH, q, WIDTH, HIDDEN]
            bits = [bits[i] for i in (0, 3, 4, 6)]
        made = []
        for i, (n, k, b) in enumerate(zip(rows, columns, bits, strict=True)):
            w = self.normal(10 + i, n, k, scale=k**-0.5)
            made.append((n, (32, b), list(mx.quantize(w, 32, b))))
        return made

    @cached_property
    def matrices(self) -> list[Float64]:
        """What they stand for: of q, k and v, out, gate and up, down."""
        full = [
            reference.dequantize(np.array(c), f64(s), f64(b), *fmt)
            for _, fmt, (c, s, b) in self.weights
        ]
        if self.joined:
            return full
        return [np.concatenate(full[:3]), full[3], np.concatenate(full[4:6]), full[6]]

    @cached_property
    def inputs(self) -> dict[str, mx.array]:
        none = mx.zeros((1,))
        columns = (HEADS + 2 * KV_HEADS) * DIM
        return {
            "h": self.normal(1, self.batch, WIDTH),
            "gains_in": self.vector(2, WIDTH),
            "gains_mlp": self.vector(3, WIDTH),
            "gains_q": self.vector(4, DIM) if self.head_norms else none,
            "gains_k": self.vector(5, DIM) if self.head_norms else none,
            "gains_attended": self.vector(6, WIDTH) if self.post_norms else none,
            "gains_mlp_out": self.vector(7, WIDTH) if self.post_norms else none,
            "bias": self.vector(8, columns) - 1 if self.bias else none,
            "frequencies": mx.array(1e4 ** -(np.arange(DIM // 4) / (DIM // 4))),
            "sinks": none,
        }

    @cached_property
    def caches(self) -> list[mx.array]:
        """Full of other tokens."""
        x = [self.normal(key, self.batch, KV_HEADS, ROOM, DIM) for key in (30, 31)]
        return [
            a if f == DENSE else quantize_kv(a, f) for a, f in zip(x, self.formats, strict=True)
        ]

    def plan(self, place: tuple[int, int, int] | None = None, **more: Any) -> Plan:
        shapes = [w[:2] for w in self.weights]
        qkv = 1 if self.joined else 3
        strides = [(KV_HEADS * ROOM * c.shape[-1], ROOM * c.shape[-1], c.shape[-1])
                   for c in self.caches]  # fmt: skip
        return plan_decode_layer(
            self.batch, WIDTH, shapes[:qkv], shapes[qkv], shapes[qkv + 1 : -1], shapes[-1],
            (HEADS, KV_HEADS), *((DIM, packing(f)) for f in self.formats), *strides,
            place or (self.keys - 1, self.keys, self.keys - 1), eps=EPSILON,
            head_eps=EPSILON if self.head_norms else None,
            post_eps=EPSILON if self.post_norms else None,
            rope=(DIM // 2, self.traditional, 1.0), dtype=NAMES[self.dtype],
            scales=NAMES[self.dtype], scale=DIM**-0.5, gain=self.gain, bias=self.bias,
            gelu=self.gelu, **more,
        )  # fmt: skip

    def run(self, **how: Any) -> tuple[mx.array, list[mx.array], Counters]:
        """h, the caches, and the counters."""
        plan = self.plan(**how.pop("options", {}))
        arrays = [*self.inputs.values(), *(a for w in self.weights for a in w[2])]
        held = {1 + i: to_numpy(c) for i, c in enumerate(self.caches)}
        dtype = DTYPES[self.dtype]
        shapes = [((self.batch, WIDTH), NUMPY[dtype]), *((a.shape, a.dtype) for a in held.values())]
        (h, *caches), counters = run_arrays(
            plan, [to_numpy(a) for a in arrays], shapes, held=held, **how
        )
        kinds = [c.dtype for c in self.caches]
        stored = [to_mlx(a, kind) for a, kind in zip(caches, kinds, strict=True)]
        return to_mlx(h, dtype), stored, counters

    def new_tokens(self) -> tuple[Float64, Float64, Float64]:
        """Queries, keys and values of the new token."""
        g = {name: f64(a) for name, a in self.inputs.items()}
        y = reference.rms_norm(g["h"], g["gains_in"], EPSILON) @ self.matrices[0].T
        y = (y + g["bias"] if self.bias else y).reshape(self.batch, -1, 1, DIM)
        q, k, v = np.split(y, [HEADS, HEADS + KV_HEADS], axis=1)
        if self.head_norms:
            q = reference.rms_norm(q, g["gains_q"], EPSILON)
            k = reference.rms_norm(k, g["gains_k"], EPSILON)
        position, f = [self.keys - 1], g["frequencies"]
        return (*(reference.rotate(a, position, f, self.traditional) for a in (q, k)), v)

    def truth(self, caches: list[mx.array]) -> Float64:
        """h after the layer, with the keys and values that are in the caches."""
        g = {name: f64(a) for name, a in self.inputs.items()}
        k, v = (decoded(c, f)[:, :, : self.keys] for c, f in zip(caches, self.formats, strict=True))
        y = reference.attention(self.new_tokens()[0], k, v, DIM**-0.5)
        y = y.reshape(self.batch, -1) @ self.matrices[1].T
        h = g["h"] + self.gain * self.post(y, g["gains_attended"])
        gate_up = reference.rms_norm(h, g["gains_mlp"], EPSILON) @ self.matrices[2].T
        gate, up = np.split(gate_up, 2, axis=-1)
        y = reference.gated(gate, up, "gelu_tanh" if self.gelu else "silu") @ self.matrices[3].T
        return np.asarray(h + self.gain * self.post(y, g["gains_mlp_out"]))

    def post(self, y: Float64, gains: Float64) -> Float64:
        return reference.rms_norm(y, gains, EPSILON) if self.post_norms else y


LAYERS = [
    Layer("llama"),
    Layer("llama, 5 rows", batch=5, bits=(3, 3, 8, 4, 6, 4, 8)),
    Layer("llama, 16 rows in bf16", batch=16, dtype="bf16", bits=(4,) * 7),
    Layer("qwen3", head_norms=True, bits=(8, 5, 4, 6, 2, 2, 3)),
    Layer("qwen2, records", bias=True, formats=(K8, V4), bits=(4, 4, 4, 4, 8, 8, 8)),
    Layer("phi3, 2 rows", joined=True, batch=2, formats=(V4, DENSE), traditional=True),
    Layer("gemma3", head_norms=True, post_norms=True, gelu=True, dtype="f32"),
    Layer("granite", gain=0.25, batch=3),
]


BATCHES = {rows: Layer(f"{rows} rows", batch=rows, head_norms=True) for rows in (1, 9, 16)}


@pytest.fixture(scope="module", autouse=True)
def _compiled_together() -> None:
    compile_together([case.plan() for case in (*LAYERS, *BATCHES.values())])


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_layer(case: Layer) -> None:
    h, caches, counters = case.run()
    assert counters.dispatches == (8 if case.post_norms else 6)
    eps = EPS[case.dtype]
    truth = case.truth(caches)
    # A rounding of each of the six results that are handed on, and those of sums in float32.
    bound = 3 * eps * np.abs(truth).max() + 1e-5
    assert np.abs(f64(h) - truth).max() <= bound
    at = case.keys - 1
    for got, was, new, fmt in zip(
        caches, case.caches, case.new_tokens()[1:], case.formats, strict=True
    ):
        kept = np.array(mx.arange(ROOM) != at)
        assert (to_numpy(got)[:, :, kept] == to_numpy(was)[:, :, kept]).all()
        stored = decoded(got, fmt)[:, :, at]
        step = 0 if fmt == DENSE else (new.max() - new.min()) / (2**fmt.bits - 1)
        assert (
            np.abs(stored - new[:, :, 0]).max() <= 0.6 * step + 2 * eps * np.abs(new).max() + 1e-5
        )


@pytest.mark.parametrize(("keys", "launches"), [(200, 6), (3000, 7)])
def test_a_layer_takes_seven_launches_or_six(keys: int, launches: int) -> None:
    """Seven where the keys are split; one more for each norm of a result."""
    for case in LAYERS:
        plan = replace(case, keys=keys).plan()
        assert len(plan["launches"]) == launches + 2 * case.post_norms


def test_a_plan_is_kept_from_token_to_token() -> None:
    """It says what a new one would, and is made anew where the keys are split in more parts."""
    case = Layer("long", formats=(K8, V4))
    places = [(n - 1, n, n + 6) for n in (1000, 1001, 1002, 3000, 3001)]
    made = []
    for i, place in enumerate(places):
        new, kept = case.plan(place=place), case.plan(place=place, before=places[:i])
        made.append(kept.pop("made"))
        assert kept == {k: v for k, v in new.items() if k != "made"}
    assert made == [1, 1, 1, 2, 2]


def test_a_row_has_the_same_bits_in_any_batch_and_any_order() -> None:
    """As the products alone: also where x is normalized, and staged."""
    whole = BATCHES[16]
    together = whole.run()[0]
    for rows in (1, 9):
        part = BATCHES[rows]
        part.__dict__["inputs"] = {**part.inputs, "h": whole.inputs["h"][:rows]}
        part.__dict__["caches"] = [c[:rows] for c in whole.caches]
        assert mx.array_equal(part.run(shuffle=rows)[0], together[:rows]), rows
