"""One failed evaluation does not fail the next one."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from optiq.base import failures


def test_errors_are_dropped_until_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: which errors MLX keeps depends on which of its threads is faster."""
    kept: Iterator[Exception | None] = iter([RuntimeError("first"), ValueError("second"), None])

    def synchronize() -> None:
        if error := next(kept):
            raise error

    monkeypatch.setattr(mx, "synchronize", synchronize)
    failures.forget_failures()
    assert next(kept, "nothing is left") == "nothing is left"
