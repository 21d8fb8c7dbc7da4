"""Records of keys and values, launched as planned and run on the emulator: `mx.*` bit for bit."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import pytest

from optiq import ops
from optiq.formats import Format
from optiq.ops import native
from optiq.ops.attention import record_words
from optiq.ops.attention_cases import DIMS, WIDTHS, normal
from optiq.ops.cases import DTYPES
from tests.msl.emulator import needs_emulator

from .launcher import NAMES, run

pytestmark = needs_emulator


def quantized(x: mx.array, form: Format) -> mx.array:
    """Records by the kernel."""
    assert native.extension is not None, native.reason
    dim = x.shape[-1]
    dtype = NAMES[next(n for n, d in DTYPES.items() if d == x.dtype)]
    the_plan = native.extension.plan_quantize_kv(
        x.size // dim, (dim, (form.group_size, form.bits)), dtype
    )
    shape = (*x.shape[:-1], record_words(dim, form))
    return run(the_plan, [x], [(shape, mx.uint32)])[0][0]


@pytest.mark.parametrize(("bits", "group"), [*product(WIDTHS, (32, 64))])
def test_records_are_those_of_mlx_bit_for_bit(bits: int, group: int) -> None:
    form = Format("affine", bits, group)
    dtype = list(DTYPES.values())[bits % 3]
    for dim in (*DIMS, 8):
        x = (normal(2, 3, 7, dim, seed=bits) * 4 + 1).astype(dtype)
        x[0, 0, 0] = 0
        x[0, 0, 1] = -1.5
        assert mx.array_equal(quantized(x, form), ops.quantize_kv(x, form))


def test_plans_of_records() -> None:
    assert native.extension is not None, native.reason
    make = native.extension.plan_quantize_kv
    assert make(0, (64, (32, 4)))["launches"] == []
    with pytest.raises(ValueError, match="dim is 60"):
        make(1, (60, (32, 4)))
    with pytest.raises(ValueError, match="too many"):
        make(2**32, (64, (32, 4)))
