"""Who imports MLX before optiq is told, where that makes MLX slow."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from optiq import blas


@pytest.mark.skipif(sys.platform != "linux", reason="only there MLX has the reference BLAS")
@pytest.mark.skipif(not blas.provider(), reason="the native part is not there")
@pytest.mark.parametrize(
    ("code", "variables", "told"),
    [
        ("import mlx.core, optiq", {}, True),
        ("import optiq, mlx.core", {}, False),
        ("import mlx.core, optiq", {"OPTIQ_BLAS": "system"}, False),
        ("import mlx.core, optiq", {"LD_PRELOAD": blas.provider()}, False),  # a fast one is there
    ],
)
def test_the_order_of_imports(code: str, variables: dict[str, str], told: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ("import optiq before mlx" in done.stderr) == told
