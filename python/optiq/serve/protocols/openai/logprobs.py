"""Log-probabilities as chat completions and completions write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...engine.request import Token
from ...tokens import TokenBytes

LEAST = -9999.0  # for minus infinity, which JSON does not have


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)


def chat_logprobs(tokens: Sequence[Token], names: TokenBytes) -> list[dict[str, Any]]:
    def one(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": names.text(token),
            "logprob": _finite(logprob),
            "bytes": list(names[token]),
        }

    return [
        {
            **one(token.id, token.logprob),
            "top_logprobs": [one(other, logprob) for other, logprob in token.top],
        }
        for token in tokens
    ]


def completion_logprobs(
    tokens: Sequence[Token], names: TokenBytes, offset: int
) -> tuple[dict[str, Any], int]:
    """The legacy form; and where the next token begins, in characters of the text."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(names.text(token.id))
    written = {
        "tokens": [names.text(token.id) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {names.text(other): _finite(logprob) for other, logprob in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }
    return written, offset
