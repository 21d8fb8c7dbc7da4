"""Memory that was freed goes back to the system."""

from __future__ import annotations

import numpy as np
import pytest

from optiq.base import memory


@pytest.mark.skipif(
    not hasattr(memory._libc, "malloc_trim"), reason="glibc keeps what is freed, others do not"
)
@pytest.mark.parametrize("kept", [0, 1 << 40])
def test_what_lies_between_arrays_is_given_back(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only if it is more than may be kept."""
    monkeypatch.setattr(memory, "KEPT", kept)
    small = 100_000  # bytes, and smaller than what malloc maps apart
    arrays = [np.ones(small, np.uint8) for _ in range(2000)]
    held = arrays[::20]
    arrays.clear()
    before = memory.held_memory()
    memory.give_back()
    assert (before - memory.held_memory() > 0.8 * 1900 * small) is (kept == 0)
    assert all(array.all() for array in held)
