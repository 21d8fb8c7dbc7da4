"""One calibration row as tokens, the way the model under measurement would see it."""

from __future__ import annotations

from ..chat.template import Tokenizer, chat_text, encode
from .rows import Row


def render(row: Row, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a valid row, text as it is or a chat; one BOS if the tokenizer has one."""
    if "text" in row:
        return encode(row["text"], tokenizer)
    return encode(chat_text(row["messages"], tokenizer, row.get("tools")).text, tokenizer)
