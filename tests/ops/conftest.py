from __future__ import annotations

import pytest

from optiq.ops import native


@pytest.fixture(params=["native", "pure"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The extension, where it is built, and the same maths on mx.*."""
    if request.param == "pure":
        monkeypatch.setattr(native, "extension", None)
    elif not native.active():
        pytest.skip("no native kernels here")
    return str(request.param)
