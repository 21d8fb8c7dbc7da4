"""Text for messages."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """An exception of another library as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def dtype_name(dtype: object) -> str:
    """`bfloat16` of mlx.core.bfloat16."""
    return str(dtype).removeprefix("mlx.core.")
