"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from optiq.base.files import whole


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_all_are_complete_before_the_first_is_in_place(tmp_path: Path) -> None:
    old, new = tmp_path / "a.json", tmp_path / "b.html"
    old.write_text("old")
    with whole(old, new) as (first, second):
        assert first.suffix == ".json"
        first.write_text("1")
        second.write_text("2")
        assert old.read_text() == "old"
        assert not new.exists()
    assert (old.read_text(), new.read_text()) == ("1", "2")
    assert names(tmp_path) == {"a.json", "b.html"}


def test_an_error_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    old, new = tmp_path / "a", tmp_path / "b"
    old.write_text("old")

    def fail() -> None:
        with whole(old, new) as (first, _):
            first.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert old.read_text() == "old"
    assert names(tmp_path) == {"a"}
