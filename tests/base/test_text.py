"""Text for messages."""

from __future__ import annotations

import io
from urllib.error import URLError

import pytest

from optiq.base.text import cause, folded


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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b"), "no such file or directory"),
        (URLError(ConnectionRefusedError(111, "Connection refused")), "connection refused"),
        (RuntimeError("[Errno -2] Name or service not known"), "name or service not known"),
        (ValueError("Expecting\n  value"), "expecting value"),
    ],
)
def test_a_cause_is_said_in_words(error: Exception, said: str) -> None:
    assert cause(error) == said
