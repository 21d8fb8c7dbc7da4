"""The Metal kernels, on the emulator, pass the trials on which a Mac decides to launch them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from optiq.formats import Format
from optiq.ops import AffineWeight, native, trials
from optiq.ops.cases import DTYPES
from optiq.ops.kl import Head
from optiq.ops.trials import TRIALS, passes
from tests.msl.emulator import needs_emulator
from tests.msl.mlx_quantize import gpu_quantize

from . import (
    test_attention,
    test_kl_divergence,
    test_low_rank,
    test_quantize,
    test_quantize_kv,
)
from .launcher import NAMES, plan_quantized_matmul, run, run_layer

pytestmark = needs_emulator


class Emulated:
    """The functions of the extension that a trial calls, with the arguments it gives."""

    def __init__(self) -> None:
        self.launches: set[int] = set()  # of a product

    def quantized_matmul(
        self,
        x: mx.array,
        *weight: mx.array | bool | int,
        indices: mx.array | None = None,
        sorted_indices: bool = False,
        exact: bool = True,
    ) -> mx.array:
        *arrays, transpose, group_size, bits = weight
        rows, width = arrays[1].shape[-2], arrays[1].shape[-1] * group_size
        out = rows if transpose else width
        experts = 0 if indices is None else arrays[0].shape[0]
        inputs = [x, *arrays] + ([] if indices is None else [indices])
        plan = plan_quantized_matmul(
            x.shape[0],
            x.shape[1],
            [(out, (group_size, bits))],
            name(x),
            name(arrays[1]),
            transpose,
            experts,
            sorted_indices,
        )
        self.launches.add(len(plan["launches"]))
        return run(plan, inputs, [((x.shape[0], out), x.dtype)])[0][0]

    def mixed_quantized_matmul(self, x: mx.array, parts: list[Any]) -> list[mx.array]:
        weights = [(p[1].shape[0], p[3:]) for p in parts]
        plan = plan_quantized_matmul(x.shape[0], x.shape[1], weights, name(x), name(parts[0][1]))
        outputs = [((x.shape[0], out), x.dtype) for out, _ in weights]
        return run(plan, [x, *(a for p in parts for a in p[:3])], outputs)[0]

    def quantize(
        self, w: mx.array, importance: mx.array | None, group_size: int, bits: int
    ) -> list[mx.array]:
        return test_quantize.quantized(w, Format("affine", bits, group_size), importance)

    def kl_divergence(
        self, h_p: mx.array, w_p: Any, h_q: mx.array, w_q: Any, *formats: Any
    ) -> tuple[mx.array, ...]:
        def head(arrays: list[mx.array], fmt: tuple[int, int]) -> Head:
            return AffineWeight(*arrays, *fmt) if len(arrays) == 3 else arrays[0]

        format_p, format_q, cap = formats
        sides = h_p, head(w_p, format_p), h_q, head(w_q, format_q)
        return test_kl_divergence.compared(sides, cap or None)

    def quantize_kv(self, x: mx.array, group_size: int, bits: int) -> mx.array:
        return test_quantize_kv.quantized(x, Format("affine", bits, group_size))

    def DecodeLayer(self, **given: Any) -> Any:
        assert native.extension is not None
        return native.extension.DecodeLayer(**given)

    def decode_layer(self, *step: Any) -> list[mx.array]:
        return run_layer(*step)[0]

    def gathered_low_rank(self, x: mx.array, a: mx.array, b: mx.array, slots: mx.array) -> mx.array:
        return test_low_rank.multiplied(x, a, b, slots)

    def quantized_attention(
        self, q: mx.array, k: mx.array, v: mx.array, k_format: Any, v_format: Any, scale: float,
        mask: str, **options: Any,
    ) -> mx.array:  # fmt: skip
        forms = [Format("affine", bits, group) for group, bits in (k_format, v_format)]
        return test_attention.attend(
            q, k, v, k_format=forms[0], v_format=forms[1], scale=scale, mask=mask, **options
        )[0]


def name(a: mx.array) -> str:
    return NAMES[next(k for k, v in DTYPES.items() if v == a.dtype)]


F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
K8, V4, W4 = Format("affine", 8, 64), Format("affine", 4, 32), Format("affine", 4, 64)
LAUNCHES = [
    ("quantized_matmul", ("one", F16, 1, (F16, 64, 4))),
    ("quantized_matmul", ("one", BF16, 16, (BF16, 64, 4))),
    ("quantized_matmul", ("one", F16, 32, (F16, 64, 3))),
    ("quantized_matmul", ("several", F16, 64, (F16, 64, 4), (F16, 32, 8))),
    ("quantized_matmul", ("not transposed", F32, 2, (F32, 64, 3))),
    ("quantized_matmul", ("several", BF16, 1, (BF16, 64, 3), (BF16, 128, 6), (BF16, 32, 3))),
    ("quantized_matmul", ("experts", F32, 2, (F32, 64, 3))),
    *(("quantized_matmul", ("sorted experts", F16, tile, (F16, 64, 4))) for tile in (16, 64)),
    ("quantize", ("min/max", F16, 64, 6)),
    ("quantize", ("search", F16, 64, 6)),
    ("kl_divergence", ((F16, 0, 0), (BF16, 64, 4))),
    ("quantize_kv", (F16, 80, V4)),
    ("quantized_attention", (F16, 64, 64, K8, V4, 3)),
    ("quantized_attention", (F32, 64, 64, K8, V4, 4, "masked", "exact")),
    ("quantized_attention", (F32, 64, 64, K8, V4, 8)),
    ("quantized_attention", (F32, 64, 64, K8, V4, 0)),
    ("gathered_low_rank", (F16,)),
    ("decode_layer", (F16, F16, 1, 64, 3, K8, V4, True, (W4,) * 3, (K8,), (W4,) * 2, (W4,))),
]


@pytest.mark.parametrize(("op", "launch"), LAUNCHES, ids=str)
def test_the_kernels_pass(op: str, launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if launch[0] == "min/max":  # what a Mac compares with
        monkeypatch.setattr(mx, "quantize", gpu_quantize)
    # The tiles that a wide weight would get, without the work it would be.
    monkeypatch.setattr(trials, "WIDE", 128)
    monkeypatch.setenv("OPTIQ_TUNE", "narrow_from=0")
    assert passes(Emulated(), op, launch)


def test_split_sums_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """And products that are not split."""
    monkeypatch.setattr(trials, "WIDE", 128)
    emulated = Emulated()
    assert passes(emulated, "quantized_matmul", ("one", F16, 32, (F16, 64, 3)))
    assert emulated.launches == {1, 2}


def test_every_op_is_here() -> None:
    assert {op for op, _ in LAUNCHES} == set(TRIALS)
