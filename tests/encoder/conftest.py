from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def buffers_of_their_own() -> Iterator[None]:
    """MLX gives no buffer again that was a little larger: a kernel is told the size of each."""
    before = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(before)
