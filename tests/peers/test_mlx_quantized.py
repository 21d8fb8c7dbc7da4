"""MLX's own tests of quantized products, with our op in place of theirs.

They are not part of MLX's wheels: OPTIQ_MLX_TESTS names the folder python/tests of its sources.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("OPTIQ_MLX_TESTS", "")

SCRIPT = """
import sys, unittest
from optiq import ops
from optiq.formats import AFFINE_BITS, AFFINE_GROUPS
import mlx.core as mx

stock, ours = mx.quantized_matmul, 0

def product(x, w, /, scales, biases=None, transpose=True, group_size=None, bits=None,
            mode="affine", **others):
    global ours
    size, width = group_size or 64, bits or 4
    known = mode == "affine" and w.ndim == 2 and size in AFFINE_GROUPS and width in AFFINE_BITS
    if not known or biases is None:
        return stock(x, w, scales, biases, transpose, group_size, bits, mode, **others)
    ours += 1
    return ops.quantized_matmul(x, w, scales, biases, transpose, size, width)

mx.quantized_matmul = product
import test_quantized

suite = unittest.defaultTestLoader.loadTestsFromModule(test_quantized)
done = unittest.TextTestRunner(verbosity=0).run(suite)
sys.exit(not done.wasSuccessful() or done.testsRun < 30 or ours < 1000)
"""


@pytest.mark.skipif(not FOLDER, reason="OPTIQ_MLX_TESTS does not name the folder of MLX's tests")
def test_tests_of_mlx_pass_with_our_product() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(FOLDER), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
