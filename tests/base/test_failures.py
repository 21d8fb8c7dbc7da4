"""One failed evaluation does not fail the next one."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from optiq.base.failures import forget_failures


def test_nothing_is_left_of_a_graph_that_raised(tmp_path: Path) -> None:
    """Without it, one of some sixty such graphs makes the evaluation after it raise."""
    path = tmp_path / "weights.safetensors"
    for _ in range(200):
        mx.save_safetensors(str(path), {f"{i}": mx.ones((64, 64)) for i in range(21)})
        weights = mx.load(str(path))
        path.write_bytes(b"")
        with pytest.raises(RuntimeError, match="read"):
            mx.eval(weights)
        forget_failures()
        mx.eval(mx.ones(3) + 1)
