"""The streamed KL, launched as planned and run on the emulator, against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from optiq.ops import AffineWeight, Comparison, native
from optiq.ops.cases import DTYPES, Pair
from optiq.ops.cases import SMALL_PAIRS as CASES
from optiq.ops.kl import Head
from tests.msl.emulator import Module, needs_emulator

from .launcher import NAMES, Plan, compile_together, run

pytestmark = needs_emulator


def described(w: Head) -> tuple[int, str, tuple[int, int]]:
    """d, dtype, (group size, bits)."""
    a, group_size, bits = (
        (w.scales, w.group_size, w.bits) if isinstance(w, AffineWeight) else (w, 0, 0)
    )
    name = NAMES[next(k for k, v in DTYPES.items() if v == a.dtype)]
    return w.shape[-1], name, (group_size, bits)


def plan(tokens: int, w_p: Head, w_q: Head, soft_cap: float | None = None) -> Plan:
    assert native.extension is not None, native.reason
    the_plan: Plan = native.extension.plan_kl_divergence(
        tokens, w_p.shape[0], described(w_p), described(w_q), soft_cap or 0.0
    )
    return the_plan


def compared(
    sides: tuple[mx.array, Head, mx.array, Head], soft_cap: float | None = None, **options: Any
) -> Comparison:
    h_p, w_p, h_q, w_q = sides
    heads = [list(w[:3]) if isinstance(w, AffineWeight) else [w] for w in (w_p, w_q)]
    inputs = [h_p.astype(mx.float32), h_q.astype(mx.float32), *heads[0], *heads[1]]
    tokens = h_p.shape[0]
    types = (mx.float32, mx.bool_, mx.float32, mx.float32)
    out, _ = run(
        plan(tokens, w_p, w_q, soft_cap), inputs, [((tokens,), t) for t in types], **options
    )
    return Comparison(*out)


@pytest.fixture(scope="module", autouse=True)
def _compiled_together() -> None:
    compile_together([plan(1, *case.sides()[1::2]) for case in CASES])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Pair) -> None:
    assert case.part(compared(case.sides(), case.soft_cap)) <= 1


def test_any_schedule_gives_the_same_bits() -> None:
    sides = CASES[5].sides()
    for a, b in zip(compared(sides), compared(sides, shuffle=7), strict=True):
        assert mx.array_equal(a, b)


def test_ties_go_to_the_first_word_and_not_finite_is_nan() -> None:
    h_p, w_p, h_q, w_q = Pair(6, 300, 32, 32).sides()
    h_p[0] = 0
    h_q[0] = 0
    h_q[2, 3] = mx.nan
    h_p[4, 0] = mx.inf
    got = compared((h_p, w_p, h_q, w_q))
    assert got.kl[0].item() == pytest.approx(0, abs=1e-6)
    assert got.agree[0].item()
    assert (np.isnan(np.array(got.kl)) == np.isin(np.arange(6), (2, 4))).all()
    assert not np.array(got.agree)[[2, 4]].any()


def test_the_text_for_metal_compiles() -> None:
    for launch in plan(4, *CASES[5].sides()[1::2])["launches"]:
        Module(source=launch["library_source"], kernels=[launch["kernel"]])


def test_plans() -> None:
    assert native.extension is not None, native.reason
    make = native.extension.plan_kl_divergence
    dense = (640, "bfloat16", (0, 0))
    big = make(512, 262_144, dense, (640, "bfloat16", (64, 4)))
    assert sum(big["temporaries"]) <= 64 << 20
    groups = big["launches"][0]["threadgroups"]
    assert groups[0] * groups[1] >= 256
    assert make(0, 10, dense, dense)["launches"] == []
    for arguments, message in (
        ((4, 0, dense, dense), "vocabulary 0"),
        ((4, 10, (0, "float32", (0, 0)), dense), "p.d is 0"),
        ((4, 10, dense, (640, "float32", (64, 7))), "q.bits is 7"),
        ((4, 10, dense, (640, "float32", (16, 4))), "q.group_size is 16"),
        ((4, 10, dense, (100, "float32", (64, 4))), "no multiple of 64"),
        ((4, 10, dense, (640, "int32", (0, 0))), "dtype is 'int32'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*arguments)
