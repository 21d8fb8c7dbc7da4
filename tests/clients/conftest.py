"""A folder with a file to copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.serving import NOTES


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "notes.txt").write_text(NOTES)
    return folder
