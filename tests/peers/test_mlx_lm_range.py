"""What optiq writes loads in the oldest mlx-lm of the declared range, too.

The newest one is what all other tests run with.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from optiq.quantize.convert import convert
from optiq.runtime import loading as runtime
from tests.peers.packages import install
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[2]

STOCK = """
import sys, mlx.core as mx, numpy as np, mlx_lm
assert mlx_lm.__version__ == sys.argv[1], mlx_lm.__version__
model, tokenizer = mlx_lm.load(sys.argv[2])
logits = model(mx.array([[5, 9, 200, 31, 7]]))
np.save(sys.argv[3], np.array(logits.astype(mx.float32)))
print(mlx_lm.generate(model, tokenizer, prompt="hello", max_tokens=3))
"""


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Version and folder of the oldest mlx-lm of the declared range."""
    declared = re.search(r'"mlx-lm>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    assert declared
    folder = tmp_path_factory.mktemp("mlx-lm")
    install(folder, f"mlx-lm=={declared[1]}")
    return declared[1], folder


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma3_text"])
def test_the_oldest_mlx_lm_reads_it(tmp_path: Path, oldest: tuple[str, Path], kind: str) -> None:
    out = tmp_path / "out"
    source = tiny_folder(tmp_path, kind, name="model")
    convert(str(source), out, tokens=320, held_out_tokens=320, progress=False)
    version, folder = oldest
    saved = tmp_path / "logits.npy"
    done = subprocess.run(
        [sys.executable, "-c", STOCK, version, str(out), str(saved)],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ours = runtime.load(str(out))[0](mx.array([[5, 9, 200, 31, 7]]))
    expected = np.load(saved)
    # Activations in 16-bit fixed point, as in tests/nn/test_accelerate.py.
    np.testing.assert_allclose(np.array(ours), expected, rtol=0, atol=1e-3 * np.abs(expected).max())
