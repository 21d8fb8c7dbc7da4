"""Text for messages."""

from __future__ import annotations

import io

import pytest

from optiq.base.text import folded


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_fit_the_terminal_and_words_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    text = "optiq convert: /a/very/long/path/that/is/one/word exists; choose --another-folder"
    assert folded(text, io.StringIO()) == text
    lines = folded(text, Terminal(), "  ").split("\n")
    assert [len(line) <= 30 or " " not in line.strip() for line in lines] == [True] * len(lines)
    assert " ".join(line.strip() for line in lines) == text
    assert all(line.startswith("  ") for line in lines[1:])
    assert folded("a\nb", Terminal()) == "a\nb"
