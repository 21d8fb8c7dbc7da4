"""optiq is imported before anything imports mlx, so that MLX gets the fast matmul (optiq.blas)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import optiq  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def little_text_to_choose_by() -> Iterator[None]:
    """A conversion measures half a dozen plans; in tests on few tokens each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optiq.calibration.texts.SELECTION_TOKENS", 320)
        yield
