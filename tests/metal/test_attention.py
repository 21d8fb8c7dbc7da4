"""Attention over quantized keys and values, launched as planned and run on the emulator, against
float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from optiq.formats import DENSE, Format
from optiq.ops import reference
from optiq.ops.attention import Exact, packing
from optiq.ops.attention_cases import ATTENTION, WIDTHS, Attention, attention, masks, normal
from optiq.ops.cases import DTYPES
from tests.msl.emulator import APPLE, Chip, KernelError, Module, needs_emulator
from tests.ops.test_quantized_attention import records

from .launcher import NAMES, Plan, compile_together, plan_quantized_attention, run

pytestmark = needs_emulator


def described(x: mx.array, dim: int, fmt: Format) -> tuple[tuple[int, tuple[int, int]], list[int]]:
    """Dim and format, and the strides, of keys or values, row-major."""
    _, heads, tokens, width = x.shape
    return (dim, packing(fmt)), [heads * tokens * width, tokens * width, width]


def plan(q: mx.array, k: mx.array, v: mx.array, **given: Any) -> Plan:
    """That of `ops.quantized_attention` with these arguments."""
    dim, mask = q.shape[-1], given.get("mask")
    (k_format, k_strides), (v_format, v_strides) = (
        described(k, dim, given["k_format"]),
        described(v, given.get("value_dim") or dim, given["v_format"]),
    )
    array = isinstance(mask, mx.array)
    exact = {n: e[0].shape[2] for n in ("first", "recent") if (e := given.get(n))}
    batch, heads, rows, _ = q.shape
    return plan_quantized_attention(
        (batch, heads, k.shape[1], rows, k.shape[2]), k_format, v_format,
        given.get("k_strides", k_strides), given.get("v_strides", v_strides),
        dtype=NAMES[next(n for n, d in DTYPES.items() if d == q.dtype)], scale=given["scale"],
        causal=mask == "causal" if isinstance(mask, str) else False,
        window=given.get("window") or 0, softcap=given.get("softcap", 0.0),
        mask=(1,) * (4 - mask.ndim) + mask.shape if array else None,
        added=array and mask.dtype != mx.bool_,
        sinks=given.get("sinks") is not None, starts=given.get("starts") is not None,
        tune=given.get("tune", ""), **exact,
    )  # fmt: skip


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    shuffle: int | bool = False,
    chip: Chip = APPLE,
    **given: Any,
) -> tuple[mx.array, Any]:
    """The result and the counters."""
    inputs = [q, k, v]
    if isinstance(mask := given.get("mask"), mx.array):
        inputs.append(mask if mask.dtype == mx.bool_ else mask.astype(mx.float32))
    if (starts := given.get("starts")) is not None:
        inputs.append(starts.astype(mx.int32))
    for name in ("first", "recent"):
        if exact := given.get(name):
            inputs += [a.astype(q.dtype) for a in exact]
    if (sinks := given.get("sinks")) is not None:
        inputs.append(sinks)
    shape = (*q.shape[:3], given.get("value_dim") or q.shape[-1])
    (y,), counters = run(
        plan(q, k, v, **given), inputs, [(shape, q.dtype)], shuffle=shuffle, chip=chip
    )
    return y, counters


def launched(
    case: Attention, shuffle: int | bool = False, chip: Chip = APPLE, **changed: Any
) -> mx.array:
    """The result, by splits of 128 keys."""
    given = case.arguments() | {"tune": "kv_split=128"} | changed
    return attend(case.queries(), *case.stored(), shuffle=shuffle, chip=chip, **given)[0]


@pytest.fixture(scope="module", autouse=True)
def _compiled_together() -> None:
    compile_together(
        [plan(c.queries(), *c.stored(), **c.arguments(), tune="kv_split=128") for c in ATTENTION]
    )


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_equals_float64_on_the_stored_values(case: Attention) -> None:
    assert case.part(launched(case)) <= 1


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("case", [(0, "causal", 4), (3, "bool", 3), (10, "starts", 1)], ids=str)
def test_16_bit_types(case: tuple[int, str, int], dtype: str) -> None:
    """Within one rounding of the result: everything between is float32."""
    c = attention(*case, dtype)
    got = launched(c)
    assert got.dtype == DTYPES[dtype]
    assert c.part(got) <= 1


def queries(rows: int, k: Format, v: Format, dtype: str, mask: str = "causal") -> Attention:
    return Attention(rows, 70, 80, k, v, mask=mask, dtype=dtype)


FORMATS = [(DENSE, Format("affine", 3, 64), "bf16"), (Format("affine", 5, 32), DENSE, "f16")]


@pytest.mark.parametrize(
    ("formats", "counts"), [(FORMATS[0], range(1, 17)), (FORMATS[1], (1, 6, 16))], ids=str
)
def test_1_to_16_queries(formats: tuple[Format, Format, str], counts: Sequence[int]) -> None:
    """Up to 4 go without matrices; up to 8 and up to 16 share tiles in two ways."""
    masked = ("causal", "window")
    cases = [queries(rows, *formats, mask) for rows in counts for mask in masked]
    given = {"tune": "kv_split=128"}
    compile_together([plan(c.queries(), *c.stored(), **c.arguments(), **given) for c in cases])
    for case in cases:
        assert case.part(launched(case)) <= 1, case


@pytest.mark.parametrize("kernel", ["attention_vector", "attention"])
def test_the_cases_have_every_width(kernel: str) -> None:
    """Of keys and of values, plain ones among them, for both kernels."""
    widths = set()
    for c in (*ATTENTION, *(queries(1, *formats) for formats in FORMATS)):
        launch = plan(c.queries(), *c.stored(), **c.arguments())["launches"][0]
        if launch["instantiation"].startswith(f"{kernel}<"):
            widths |= {("k", c.k.bits), ("v", c.v.bits)}
    assert widths == {(side, bits) for side in "kv" for bits in (*WIDTHS, DENSE.bits)}


@pytest.mark.parametrize("group", [1, 2])
def test_a_query_has_the_same_bits_beside_others(group: int) -> None:
    """As far as they go without matrices; the keys are split, for the last query too."""
    form, rows, keys = Format("affine", 6, 32), 4 // group, 260
    given = {"k_format": form, "v_format": form, "scale": 0.125, "mask": "causal",
             "starts": mx.array([3]), "tune": "kv_split=128"}  # fmt: skip
    q = normal(1, 2 * group, rows, 64, seed=1)
    k, v = (records(normal(1, 2, keys, 64, seed=s), form)[0] for s in (2, 3))
    together, _ = attend(q, k, v, **given)
    for end in range(1, rows + 1):
        for begin in range(end):
            there = keys - rows + end
            some, _ = attend(q[:, :, begin:end], k[:, :, :there], v[:, :, :there], **given)
            assert mx.array_equal(some, together[:, :, begin:end]), (begin, end)


@pytest.mark.parametrize("value_dim", [64, 128])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_exact_vectors_replace_their_records(rows: int, value_dim: int) -> None:
    keys, starts, form = rows + 120, np.array([0, 4]), Format("affine", 4, 32)
    q, k, v = (normal(2, h, n, d, seed=h + n)
               for h, n, d in ((6, rows, 64), (2, keys, 64), (2, keys, value_dim)))  # fmt: skip
    (k_records, exact_k), (v_records, exact_v) = records(k, form), records(v, form)
    index = mx.array(starts[:, None] + np.arange(2))[:, None, :, None]
    first = Exact(*(mx.take_along_axis(a, index, 2) for a in (k, v)))
    recent = Exact(k[:, :, -5:], v[:, :, -5:])
    for stored, plain in ((exact_k, np.array(k)), (exact_v, np.array(v))):
        for b, start in enumerate(starts):
            stored[b, :, start : start + 2] = plain[b, :, start : start + 2]
        stored[:, :, -5:] = plain[:, :, -5:]
    _, array = masks("causal", 2, rows, keys)
    array = array & (np.arange(keys) >= starts[:, None, None, None])
    got, _ = attend(
        q, k_records, v_records, k_format=form, v_format=form, scale=0.125, mask="causal",
        starts=mx.array(starts), first=first, recent=recent, value_dim=value_dim,
        tune="kv_split=128",
    )  # fmt: skip
    expected = reference.attention(np.array(q), exact_k, exact_v, 0.125, array)
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=1e-5)


LONG = attention(1, "causal", 3)  # two splits


def test_a_cache_with_room_is_read_in_place() -> None:
    """k and v as mlx-lm's caches give them: slices of longer arrays, whose rest is never read."""
    q, keys, strides, longer = LONG.queries(), LONG.keys, {}, []
    for name, x in zip("kv", LONG.stored(), strict=True):
        room = mx.full((2, 2, 10, x.shape[3]), 2**32 - 1, dtype=mx.uint32)
        longer.append(mx.concatenate([x, room], axis=2))
        strides[f"{name}_strides"] = [2 * (keys + 10) * x.shape[3], (keys + 10) * x.shape[3]]
        strides[f"{name}_strides"].append(x.shape[3])
    the_plan = plan(q, *LONG.stored(), **LONG.arguments(), **strides, tune="kv_split=128")
    assert the_plan["strided"] == [1, 2]
    (y,), _ = run(the_plan, [q, *longer], [(q.shape, q.dtype)])
    assert mx.array_equal(y, launched(LONG))


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_a_padded_row_of_a_batch_has_the_bits_it_has_alone(rows: int) -> None:
    form, lengths = Format("affine", 4, 64), (170, 140, 300)
    given = {"k_format": form, "v_format": form, "scale": 0.125, "mask": "causal",
             "tune": "kv_split=128"}  # fmt: skip
    q = normal(3, 4, rows, 64, seed=1)
    k, v = (records(normal(3, 2, 300, 64, seed=s), form)[0] for s in (2, 3))
    starts = mx.array([300 - n for n in lengths])
    together, _ = attend(q, k, v, starts=starts, **given)
    for b, n in enumerate(lengths):
        alone, _ = attend(q[b : b + 1], k[b : b + 1, :, -n:], v[b : b + 1, :, -n:], **given)
        assert mx.array_equal(together[b], alone[0])


def test_rows_that_see_nothing_and_rows_that_are_nan() -> None:
    mask = np.ones((2, 1, LONG.rows, LONG.keys), np.bool_)
    mask[0, :, 1] = False
    q = np.array(LONG.queries())
    q[1, 2, 0, 5] = np.nan
    given = LONG.arguments() | {"mask": mx.array(mask), "tune": "kv_split=128"}
    got, _ = attend(mx.array(q), *LONG.stored(), **given)
    out = np.array(got)
    assert (out[0, :, 1] == 0).all()
    nan = np.zeros(out.shape, np.bool_)
    nan[1, 2, 0] = True
    assert (np.isnan(out) == nan).all()


@pytest.mark.parametrize(
    "case", [LONG, attention(0, "bool", 8), attention(0, "window", 4)], ids=str
)
def test_any_order_of_execution_gives_the_same_bits(case: Attention) -> None:
    assert mx.array_equal(launched(case), launched(case, shuffle=7))


MATRICES = {
    "no barrier before a tile is read": ("sync_tile<SHARE>();\n}", "}"),
    "values written before scores were read": (
        "kBlockWidth + column;\n  sync_tile<SHARE>();", "kBlockWidth + column;",
    ),
    "no barrier before teams meet": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (team == 0)", "if (team == 0)",
    ),
    "keys past the last one": ("key, key < end, at, x", "key, true, at, x"),
    "rows past the last query": ("team != 0 || row >= row_end", "team != 0"),
}  # fmt: skip
FEW_ROWS = {
    "no barrier before simdgroups meet": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (simdgroup == 0 && member == 0)",
        "if (simdgroup == 0 && member == 0)",
    ),
    "words past the last record": ("shift + 8 * BITS > 32 ? from[1] : 0u", "from[1]"),
    "keys past the last one": ("keys, key, there && column", "keys, key, column"),
    "elements past the last one": ("keys, key, there && column < DIM", "keys, key, there"),
    "columns past the last one": ("member != 0 || column >= VALUE_DIM", "member != 0"),
}  # fmt: skip
FAULTS = [(rows, fault) for rows, faults in ((12, MATRICES), (1, FEW_ROWS)) for fault in faults]


@pytest.mark.parametrize(("rows", "fault"), FAULTS)
def test_a_fault_planted_in_the_kernel_is_reported(
    rows: int, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = (FEW_ROWS if rows == 1 else MATRICES)[fault]

    def broken(launch: dict[str, Any], mode: Any, contracts: bool) -> Module:
        text = launch["library_source"]
        assert right in text or "merge" in launch["kernel"]
        return Module(source=text.replace(right, wrong), kernels=[launch["kernel"]], mode=mode)

    monkeypatch.setattr("tests.metal.launcher.module", broken)
    form, dim = Format("affine", 3, 32), 64 if "words" in fault else 80
    q = normal(1, 2, 5 if "past" in fault and rows > 1 else rows, dim, seed=0)
    k, v = (records(normal(1, 2, 151, dim, seed=i), form)[0] for i in (1, 2))
    options = {"k_format": form, "v_format": form, "scale": 0.1, "tune": "kv_split=128"}
    with pytest.raises(KernelError):
        attend(q, k, v, **options)


def test_the_text_for_metal_compiles() -> None:
    for launch in plan(LONG.queries(), *LONG.stored(), **LONG.arguments())["launches"]:
        text = launch["library_source"]
        assert text.isascii()
        assert '#include "' not in text
        Module(source=text, kernels=[launch["kernel"]])
