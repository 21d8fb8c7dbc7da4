from __future__ import annotations

import pytest

from optiq.ops import native


@pytest.fixture(params=["native", "pure"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything with the extension, where it is built, and with the same maths on mx.*."""
    if request.param == "pure":
        monkeypatch.setattr(native, "extension", None)
    elif native.extension is None:
        pytest.skip(f"no native kernels: {native.reason}")
