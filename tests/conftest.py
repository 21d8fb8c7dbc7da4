"""optiq is imported before anything imports mlx, so that MLX gets the fast matmul (optiq.blas)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

import optiq  # noqa: F401
from optiq.base.failures import forget_failures

# The same code is tested with the same examples; OPTIQ_EXPLORE=1 draws others.
settings.register_profile("same", derandomize="OPTIQ_EXPLORE" not in os.environ)
settings.load_profile("same")


@pytest.fixture(autouse=True, scope="session")
def short_conversions() -> Iterator[None]:
    """A conversion measures half a dozen plans, in tests on few tokens each, asks nothing, and
    probes the machine for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optiq.calibration.texts.SELECTION_TOKENS", 320)
        if find_spec("mlx_lm"):  # the tests of ops also run without (cross/test_aarch64.sh)
            patch.setattr("optiq.quantize.prepare.HELD_OUT_TOKENS", 320)
            patch.setattr("optiq.quantize.convert.PROMPTS", ())
            patch.setattr("optiq.quantize.estimate._PROBE", 0.02)
            patch.setattr("optiq.quantize.estimate._LONG_ENOUGH", 0.002)
        yield


@pytest.fixture(autouse=True)
def no_failures_of_others() -> Iterator[None]:
    """A graph that failed in one test does not fail the next one."""
    yield
    forget_failures()
