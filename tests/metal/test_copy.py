"""The copy that makes inputs row-major, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from optiq.ops import native
from tests.msl.emulator import needs_emulator

from .launcher import run_arrays

pytestmark = needs_emulator

BASE = np.arange(7 * 6 * 10 * 4).reshape(7, 6, 10, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a.transpose(3, 1, 0, 2),
        lambda a: a[::2, 1:, :, 3],
        lambda a: np.broadcast_to(a[0, 0, 0], (5, 4)),
        lambda a: a[0, 0, 0, :1].reshape(()),
    ],
    ids=["as it is", "transposed", "sliced", "broadcast", "scalar"],
)
def test_row_contiguous(view, dtype: type) -> None:  # type: ignore[no-untyped-def]
    base = BASE.astype(dtype)
    a = view(base)
    # A launch gets the buffer from the array's first element on.
    first = (a.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // a.itemsize
    strides = [s // a.itemsize for s in a.strides]
    assert native.extension is not None, native.reason
    plan = native.extension.plan_row_contiguous(list(a.shape), strides, a.itemsize)
    (out,), _ = run_arrays(plan, [base.reshape(-1)[first:]], [(a.shape, dtype)])
    assert np.array_equal(out, a)


def test_more_axes_than_it_takes() -> None:
    assert native.extension is not None, native.reason
    with pytest.raises(ValueError, match="9 axes"):
        native.extension.plan_row_contiguous([1] * 9, [1] * 9, 4)
