"""The native RMSNorm against float64."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from optiq.ops import native


@pytest.fixture
def ext() -> ModuleType:
    found = native.active()
    if found is None:
        pytest.skip("only the extension has it")
    return found


@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 100), (2, 576), (70, 33)])
def test_it_is_right(ext: ModuleType, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(sum(shape))
    x = (3 * rng.standard_normal(shape)).astype(np.float32)
    weight = rng.standard_normal(shape[-1]).astype(np.float32)
    got = np.array(ext.rms_norm(mx.array(x), mx.array(weight), 1e-5))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
    assert np.abs(got - expected).max() <= 3e-7 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (mx.zeros((2, 8)), mx.zeros((4,))),
        (mx.zeros((2, 8), dtype=mx.float16), mx.zeros((8,))),
        (mx.zeros((0, 8)), mx.zeros((8,))),
        (mx.array(1.0), mx.zeros((1,))),
    ],
)
def test_what_does_not_belong_together_is_refused(
    ext: ModuleType, x: mx.array, weight: mx.array
) -> None:
    with pytest.raises(ValueError, match="rms_norm"):
        ext.rms_norm(x, weight, 1e-5)
