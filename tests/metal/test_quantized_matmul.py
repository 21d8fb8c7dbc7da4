"""The quantized products, launched as planned and run on the emulator, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from optiq.ops import reference
from optiq.ops.cases import DTYPES, QUANTIZED, Product, f64
from tests.msl.emulator import needs_emulator
from tests.ops.test_matmul import assert_product

from .launcher import NAMES, Plan, compile_together, plan_quantized_matmul, run

pytestmark = needs_emulator

# One chip of each row of the tuning table.
CHIPS = ["applegpu_g13g", "applegpu_g15s", "applegpu_g14d"]

# The largest take most of the time: of the three dtypes each format has one, the next another.
LARGE = [c for c in QUANTIZED if c.rows >= 130]
CASES = [c for c in QUANTIZED if c.rows < 130] + [
    c for n, c in enumerate(LARGE) if n // 3 % 3 == n % 3
]


def plan(case: Product, transpose: bool = True, gpu: str = CHIPS[0], tune: str = "") -> Plan:
    dtype = NAMES[case.dtype]
    out, inner = (case.out, case.inner) if transpose else (case.inner, case.out)
    weights = [(out, (case.group_size, case.bits))]
    return plan_quantized_matmul(
        case.rows, inner, weights, dtype, dtype, transpose, gpu=gpu, tune=tune
    )


def multiply(case: Product, the_plan: Plan, transpose: bool = True, **options: object) -> mx.array:
    x = case.activations(None if transpose else case.out)
    shape = (case.rows, case.out if transpose else case.inner)
    (y,), _ = run(the_plan, [x, *case.quantized()], [(shape, x.dtype)], **options)  # type: ignore[arg-type]
    return y


@pytest.fixture(scope="module", autouse=True)
def _compiled_together() -> None:
    compile_together([plan(case) for case in CASES])
    compile_together([plan(case, False) for case in QUANTIZED])
    compile_together([plan(case, gpu=gpu) for case in OTHER_CHIPS for gpu in CHIPS[1:]])
    compile_together([case.plan() for case in SORTED])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantized_matmul(case: Product) -> None:
    y = multiply(case, plan(case))
    assert case.part(y) <= 1


@pytest.mark.parametrize("case", QUANTIZED[::4], ids=str)
def test_not_transposed(case: Product) -> None:
    y = multiply(case, plan(case, False), False)
    assert case.part(y, transpose=False) <= 1


OTHER_CHIPS = [
    Product(rows, 70, 576, bits, 64, dtype)
    for (bits, dtype), rows in product(((3, "bf16"), (4, "f16"), (8, "f32")), (1, 5, 11, 40))
]


@pytest.mark.parametrize("gpu", CHIPS[1:])
@pytest.mark.parametrize("case", OTHER_CHIPS, ids=str)
def test_tiles_of_other_chips(case: Product, gpu: str) -> None:
    y = multiply(case, plan(case, gpu=gpu))
    assert case.part(y) <= 1


@pytest.mark.parametrize(("x", "scales"), [p for p in product(DTYPES, DTYPES) if p[0] != p[1]])
@pytest.mark.parametrize("rows", [2, 20])
def test_scales_of_another_type(x: str, scales: str, rows: int) -> None:
    case = Product(rows, 40, 128, 5, 64, scales)
    left = case.activations().astype(DTYPES[x])
    dtype = mx.result_type(left, DTYPES[scales])
    the_plan = plan_quantized_matmul(rows, 128, [(40, (64, 5))], NAMES[x], NAMES[scales])
    (y,), _ = run(the_plan, [left, *case.quantized()], [((rows, 40), dtype)])
    name = next(k for k, v in DTYPES.items() if v == dtype)
    assert_product(y, f64(left), f64(case.affine()), name)


@pytest.mark.parametrize(
    ("gpu", "bits", "dtype"), list(zip(CHIPS, (3, 4, 8), ("f16", "bf16", "f32"), strict=True))
)
def test_a_row_does_not_depend_on_the_rows_beside_it(gpu: str, bits: int, dtype: str) -> None:
    """Batched or speculative decoding must not move near-tie tokens: bit-equal up to 16 rows."""
    whole = Product(16, 45, 608, bits, 32, dtype)
    x, weight = whole.activations(), whole.quantized()
    counts = range(1, 17)
    plans = [plan(Product(m, 45, 608, bits, 32, dtype), gpu=gpu) for m in counts]
    compile_together(plans)
    alone = []
    for m, the_plan in zip(counts, plans, strict=True):
        (y,), _ = run(the_plan, [x[:m], *weight], [((m, 45), x.dtype)])
        alone.append(y)
    for y in alone:
        assert mx.array_equal(y, alone[-1][: y.shape[0]])


@pytest.mark.parametrize(
    ("rows", "inner", "bits", "dtype"),
    [(17, 800, 3, "bf16"), (40, 576, 4, "f16"), (70, 1152, 8, "f32")],
)
def test_split_sums(rows: int, inner: int, bits: int, dtype: str) -> None:
    """Of a weight too small to fill the GPU; the last split and the last tile may be short."""
    case = Product(rows, 70, inner, bits, 32, dtype)
    the_plan = plan(case)
    assert len(the_plan["launches"]) == 2
    y = multiply(case, the_plan)
    assert case.part(y) <= 1
    assert mx.array_equal(multiply(case, the_plan, shuffle=3), y)


def test_a_weight_has_the_same_sums_beside_a_large_one() -> None:
    """One of them is split, the other is not."""
    cases = [Product(17, out, 512, 4, 64, "f16") for out in (1100, 33)]
    weights = [(c.out, (c.group_size, c.bits)) for c in cases]
    dtype = NAMES["f16"]
    together = plan_quantized_matmul(17, 512, weights, dtype, dtype, True, gpu=CHIPS[0], tune="")
    assert [len(plan(c)["launches"]) for c in cases] == [1, 2]
    x = cases[0].activations()
    inputs = [x, *(a for c in cases for a in c.quantized())]
    ys, _ = run(together, inputs, [((17, c.out), x.dtype) for c in cases])
    for case, y in zip(cases, ys, strict=True):
        (alone,), _ = run(plan(case), [x, *case.quantized()], [((17, case.out), x.dtype)])
        assert mx.array_equal(y, alone)


MIXES = {
    "qkv": [(96, (64, 4)), (32, (64, 6)), (33, (32, 8))],
    "gate and up": [(70, (128, 3)), (70, (64, 4))],
    "four": [(1, (32, 2)), (64, (64, 5)), (31, (128, 4)), (100, (32, 4))],
}


@pytest.mark.parametrize("rows", [1, 3, 6, 16, 17, 70])
@pytest.mark.parametrize("name", MIXES)
def test_several_weights_in_one_launch(name: str, rows: int) -> None:
    """Equal to the bit to each product alone, and one dispatch."""
    cases = [Product(rows, out, 256, bits, g, "f16") for out, (g, bits) in MIXES[name]]
    weights = [(c.out, (c.group_size, c.bits)) for c in cases]
    together = plan_quantized_matmul(rows, 256, weights)
    singles = [plan(c, gpu="applegpu_g15s") for c in cases]
    compile_together([together])
    compile_together(singles)
    x = cases[0].activations()
    inputs = [x, *(a for c in cases for a in c.quantized())]
    out, counters = run(together, inputs, [((rows, c.out), x.dtype) for c in cases])
    assert counters.dispatches == 1
    for case, single, y in zip(cases, singles, out, strict=True):
        assert_product(y, f64(x), f64(case.affine()), "f16")
        assert mx.array_equal(y, multiply(case, single))


def test_more_weights_or_types_than_a_launch_takes() -> None:
    cases = [Product(2, 40 + i, 64, 4, 64, "bf16" if i % 2 else "f16") for i in range(7)]
    weights = [(c.out, (c.group_size, c.bits)) for c in cases]
    scales = [NAMES[c.dtype] for c in cases]
    the_plan = plan_quantized_matmul(2, 64, weights, "float16", scales)
    x = cases[0].activations()
    dtypes = [mx.result_type(x, DTYPES[c.dtype]) for c in cases]
    shapes = [((2, c.out), dtype) for c, dtype in zip(cases, dtypes, strict=True)]
    out, counters = run(the_plan, [x, *(a for c in cases for a in c.quantized())], shapes)
    assert counters.dispatches == 2
    for case, y, dtype in zip(cases, out, dtypes, strict=True):
        name = next(k for k, v in DTYPES.items() if v == dtype)
        assert_product(y, f64(x), f64(case.affine()), name)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_experts(bits: int, transpose: bool) -> None:
    rng = np.random.default_rng(bits)
    w = mx.array(rng.standard_normal((5, 64, 96), dtype=np.float32)).astype(mx.float16)
    out, inner = (64, 96) if transpose else (96, 64)
    x = mx.array(rng.standard_normal((7, inner), dtype=np.float32)).astype(mx.float16)
    which = np.array([4, 0, 3, 9, 3, 1, 0], np.uint32)  # one does not exist
    weight = mx.quantize(w, 32, bits)
    the_plan = plan_quantized_matmul(7, inner, [(out, (32, bits))], transpose=transpose, experts=5)
    (y,), _ = run(the_plan, [x, *weight, mx.array(which)], [((7, out), x.dtype)])
    codes, scales, biases = weight
    full = reference.dequantize(np.array(codes), f64(scales), f64(biases), 32, bits)
    for i, expert in enumerate(which):
        if expert < 5:
            right = full[expert] if transpose else full[expert].T
            assert_product(y[i : i + 1], f64(x[i : i + 1]), right, "f16")
        else:
            assert mx.isnan(y[i]).all()


@dataclass(frozen=True)
class Sorted:
    """Rows of each expert, and then some that name none. A weight is [72, 96]."""

    name: str
    bits: int
    dtype: str
    counts: tuple[int, ...]
    nowhere: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def indices(self) -> np.ndarray:
        experts = len(self.counts)
        held = np.repeat(np.arange(experts), self.counts)
        return np.concatenate([held, experts + np.arange(self.nowhere)]).astype(np.uint32)

    @property
    def arrays(self) -> list[mx.array]:
        """x, then codes, scales and biases."""
        rng, dtype = np.random.default_rng(self.bits), DTYPES[self.dtype]
        shapes = (len(self.indices), 96), (len(self.counts), 72, 96)
        x, w = (mx.array(rng.standard_normal(s, dtype=np.float32)).astype(dtype) for s in shapes)
        return [x, *mx.quantize(w, 32, self.bits)]

    def plan(self) -> Plan:
        kind, experts = NAMES[self.dtype], len(self.counts)
        return plan_quantized_matmul(
            len(self.indices), 96, [(72, (32, self.bits))], kind, kind, experts=experts, sorted=True
        )

    def multiply(self, **how: Any) -> mx.array:
        x, *weight = self.arrays
        inputs = [x, *weight, mx.array(self.indices)]
        return run(self.plan(), inputs, [((x.shape[0], 72), x.dtype)], **how)[0][0]


SORTED = [
    Sorted("tiles of 16", 3, "bf16", (1, 0, 33, 16, 0, 5, 2)),
    Sorted("tiles of 32", 4, "f16", (70, 0, 3, 32), 3),
    Sorted("tiles of 64", 8, "f32", (1, 64, 0, 130), 66),
    Sorted("more experts than lanes", 4, "f16", (0,) * 31 + (2, 1) + (0,) * 30 + (20, 3), 1),
]


@pytest.mark.parametrize("case", SORTED, ids=str)
def test_sorted_experts(case: Sorted) -> None:
    """Each row against float64, and the same bits in any order of execution."""
    kernels = [launch["kernel"] for launch in case.plan()["launches"]]
    assert kernels[0] == "expert_rows_uint"
    assert kernels[1].startswith("qmm_experts")
    y, held = case.multiply(), sum(case.counts)
    x, codes, scales, biases = case.arrays
    full = reference.dequantize(np.array(codes), f64(scales), f64(biases), 32, case.bits)
    for expert in np.flatnonzero(case.counts):
        own = np.flatnonzero(case.indices == expert)
        assert_product(y[mx.array(own)], f64(x)[own], full[expert], case.dtype)
    assert mx.isnan(y[held:]).all()
    assert mx.array_equal(case.multiply(shuffle=2), y, equal_nan=True)


def test_experts_that_are_not_sorted_read_nothing_beyond_their_arrays() -> None:
    """What is computed then is not said."""
    rng = np.random.default_rng(0)
    weight = mx.quantize(mx.array(rng.standard_normal((5, 64, 96), dtype=np.float32)), 32, 4)
    x = mx.array(rng.standard_normal((40, 96), dtype=np.float32))
    which = mx.array(rng.integers(0, 7, 40).astype(np.uint32))
    the_plan = plan_quantized_matmul(
        40, 96, [(64, (32, 4))], "float32", "float32", experts=5, sorted=True
    )
    run(the_plan, [x, *weight, which], [((40, 64), x.dtype)])


@pytest.mark.parametrize(
    "case", [Product(1, 4096, 4096, 4, 64, "f16"), Product(8, 2048, 4096, 3)], ids=str
)
def test_sizes_of_a_model(case: Product) -> None:
    y = multiply(case, plan(case), mode="fast")
    assert case.part(y) <= 1


@pytest.mark.parametrize(
    "case", [Product(m, 37, 320, 4, 64, "f16") for m in (1, 6, 16, 40)], ids=str
)
def test_any_order_of_execution_gives_the_same_bits(case: Product) -> None:
    first = multiply(case, plan(case))
    for seed in (1, 2):
        assert mx.array_equal(first, multiply(case, plan(case), shuffle=seed))
