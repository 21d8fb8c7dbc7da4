"""What a request says of the Python that the server runs."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any

from ..asked import Interpreter
from ..runs import Ran
from ..tools.python import NAME, TOOL
from .fields import Fields

MAX_FILES = 64
MAX_CALLS = 64


def interpreter(
    tool: Fields, container: str | None, seen: Iterable[str], most_calls: int | None
) -> Interpreter:
    """From the tool in a request. `container` is the one it names; else the last of those `seen` in
    the conversation goes on, where it is still there. `files` are ours: base64 by name."""
    given = tool.object("files")
    if given is not None and len(given.values) > MAX_FILES:
        raise tool.wrong("files", f"has more than {MAX_FILES} files")
    files = {name: _file(given, name) for name in (given.values if given else {})}
    return Interpreter(container, tuple(seen), files, most_calls or Interpreter.most_calls)


def _file(files: Fields | None, name: str) -> bytes:
    assert files is not None
    try:
        return base64.b64decode(files.text(name) or "", validate=True)
    except binascii.Error:
        raise files.wrong(name, "is not base64") from None


def with_python(tools: list[dict[str, Any]], where: Fields) -> None:
    """Add the server's Python to the tools of a request."""
    if any(tool["function"]["name"] == NAME for tool in tools):
        raise where.wrong("type", f"brings a tool {NAME!r}, and there is another of that name")
    tools.append(TOOL)


def written_files(ran: Ran) -> list[dict[str, Any]]:
    """The files of a run, and where the client finds them."""
    base = f"/v1/containers/{ran.container}/files"
    return [
        {"name": name, "bytes": len(data), "url": f"{base}/{name}/content"}
        for name, data in sorted(ran.files.items())
    ]


def pictures(ran: Ran) -> list[str]:
    """Pictures as data URLs."""
    return [
        f"data:image/png;base64,{base64.b64encode(data).decode()}"
        for name, data in sorted(ran.files.items())
        if name.endswith(".png")
    ]
