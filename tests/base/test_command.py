"""The command that files name."""

from __future__ import annotations

import sys

import pytest

from optiq.base.command import command_line


def test_of_paths_the_last_part_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "/opt/bin/optiq convert /home/me/models/m -o ~/out --scores=../x/s.json --size 4.8bpw"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--resume", "."])
    assert command_line() == "optiq convert m -o out --scores=s.json --size 4.8bpw ."
    monkeypatch.setattr(sys, "argv", ["/home/me/script.py", "x"])
    assert command_line() == ""
