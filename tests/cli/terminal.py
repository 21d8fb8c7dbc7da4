"""A command in a real terminal (a pty), and the lines that are left on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

CODE = "import sys; from optiq.cli import main; sys.exit(main())"
_SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


def run(*argv: str, columns: int, cwd: Path) -> tuple[int, list[str]]:
    """The exit code of `optiq *argv`, and the screen at its end."""
    code, text = written(*argv, columns=columns, cwd=cwd)
    return code, screen(text)


def written(*argv: str, columns: int, cwd: Path, **variables: str) -> tuple[int, str]:
    """The exit code, and all that it wrote with these variables in its environment."""
    host, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *argv],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=cwd,
        env={**environment, "TERM": "xterm-256color", **variables},
        start_new_session=True,
    )
    os.close(terminal)
    text = b""
    while True:
        try:
            part = os.read(host, 1 << 16)
        except OSError:  # how Linux says that the other side has closed
            break
        if not part:
            break
        text += part
    os.close(host)
    return process.wait(60), text.decode()


def screen(text: str) -> list[str]:
    """The lines as a terminal without an edge shows them, so that too long ones can be seen."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(text):
        if match := _SEQUENCE.match(text, at):
            at = match.end()
            if match[2] == "A":
                row = max(0, row - int(match[1] or 1))
            elif match[2] == "K":
                lines[row] = "" if match[1] == "2" else lines[row][:column]
            continue
        letter = text[at]
        at += 1
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif letter != "\x07":
            line = lines[row].ljust(column)
            lines[row] = line[:column] + letter + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
