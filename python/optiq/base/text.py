"""Text for messages."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import TextIO


def folded(text: str, stream: TextIO, indent: str = "") -> str:
    """Lines that fit the terminal, if `stream` is one; `indent` is for all but the first."""
    if not stream.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(
            line, columns, subsequent_indent=indent, break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )  # fmt: skip


def one_line(error: BaseException) -> str:
    """An exception of another library as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def cause(error: BaseException) -> str:
    """`one_line`, but of an error of the system only what is wrong: the message names the file."""
    if isinstance(inner := getattr(error, "reason", None), OSError):  # of a URL
        error = inner
    said = error.strerror if isinstance(error, OSError) else None
    said = said or re.sub(r"\[Errno -?\d+\] ", "", one_line(error))
    return said[:1].lower() + said[1:]


def dtype_name(dtype: object) -> str:
    """`bfloat16` of mlx.core.bfloat16."""
    return str(dtype).removeprefix("mlx.core.")
