"""A decoder layer in few launches, as planned and run on the emulator, against float64."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from bench.layer_counters import ours, stock
from optiq.formats import Format
from optiq.ops.layer_cases import LAYERS, W4, W8, LayerCase
from tests.msl.emulator import needs_emulator

from .launcher import compile_together, native_layer, plan_layer, run_layer, strides

pytestmark = needs_emulator

BATCHES = {rows: LayerCase(f"{rows} rows", batch=rows, head_norms=True) for rows in (1, 9, 16)}
W3_64, W4_64, W6_64, W8_64 = (Format("affine", bits, 64) for bits in (3, 4, 6, 8))
LLAMA = LayerCase(
    "llama", (W4_64, W6_64, W8_64), W3_64, (W4_64, W4_64), W8_64, keys=200, width=512, hidden=1024,
    dim=64, heads=24, kv_heads=8,
)  # fmt: skip
SHAPES = [LLAMA, replace(LLAMA, name="gemma3", head_norms=True, post_norms=True, gelu=True)]


@pytest.fixture(scope="module", autouse=True)
def _compiled_together() -> None:
    compile_together([plan_layer(case) for case in (*LAYERS, *BATCHES.values(), *SHAPES)])


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_layer(case: LayerCase) -> None:
    out, counters = run_layer(native_layer(case), case.h, *case.caches, case.place)
    assert counters.dispatches == (8 if case.post_norms else 6)
    assert case.part(*out) <= 1
    assert sum(counters.bytes_written) == bytes_handed_on(case)


def bytes_handed_on(case: LayerCase) -> int:
    """Projections, queries, what was attended, h between, gated and h, each once, and the new
    token's keys and values: normalized activations, gate and up are never written."""
    layer = case.layer
    columns = sum(w.shape[0] for w in layer.qkv) + 2 * layer.heads * layer.dim + case.hidden
    vectors = columns + 2 * case.width * (2 if case.post_norms else 1)
    stored = sum(c.shape[-1] * c.itemsize for c in case.caches)
    return case.batch * (vectors * case.h.itemsize + layer.kv_heads * stored)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_a_layer_reads_no_more_lines_than_stock(case: LayerCase) -> None:
    """And writes no more, in fewer launches."""
    a, b = ours(case), stock(case)
    assert a.lines <= b.lines
    assert a.written <= b.written
    assert a.dispatches <= b.dispatches // 2


@pytest.mark.parametrize(("keys", "launches"), [(200, 6), (3000, 7)])
def test_a_layer_takes_seven_launches_or_six(keys: int, launches: int) -> None:
    """Seven where the keys are split; one more for each norm of a result."""
    for case in LAYERS:
        plan = plan_layer(replace(case, keys=keys))
        assert len(plan["launches"]) == launches + 2 * case.post_norms


def test_a_plan_is_kept_from_token_to_token() -> None:
    """It says what a new one would, and is made anew where the keys are split in more parts."""
    case = LayerCase("long", formats=(W8, W4))
    layer = native_layer(case)
    made = []
    for n in (1000, 1001, 1002, 3000, 3001):
        place, (k, v) = (n - 1, n, n + 6), map(strides, case.caches)
        assert layer.plan(1, place, k, v) == plan_layer(case, place=place)
        made.append(layer.plans_made)
    assert made == [1, 1, 1, 2, 2]


def test_a_row_has_the_same_bits_in_any_batch_and_any_order() -> None:
    """As the products alone: also where x is normalized, and staged."""
    whole = BATCHES[16]
    layer = native_layer(whole)
    together = run_layer(layer, whole.h, *whole.caches, whole.place)[0]
    for rows in (1, 9):
        part = (a[:rows] for a in (whole.h, *whole.caches))
        alone = run_layer(layer, *part, whole.place, shuffle=rows)[0]
        assert mx.array_equal(alone[0], together[0][:rows]), rows
