"""The bytes of each token, as log-probabilities report them."""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Bytes by token id; a character may be split between tokens, so a token may not be text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        decoder = json.dumps(backend.get("decoder"))
        self._bytes = _byte_alphabet() if '"ByteLevel"' in decoder else None
        self._fallback = '"ByteFallback"' in decoder
        self._added = {token["id"]: token["content"] for token in backend["added_tokens"]}

    def __getitem__(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the embedding that the tokenizer does not use
            return b""
        if self._bytes is not None:
            return bytes(self._bytes[c] for c in piece if c in self._bytes)
        if self._fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return str(piece).replace("▁", " ").encode()

    def text(self, token: int) -> str:
        """The token as text; bytes that are not text are written as `\\xe2`."""
        return self[token].decode("utf-8", errors="backslashreplace")


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes, printable ones for all 256."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }
