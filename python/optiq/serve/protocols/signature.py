"""Signatures by which our own reasoning is known when a client sends it back.

A signature is an HMAC of the reasoning. Where the client does not want to see the reasoning, the
signature carries it, because the next turn needs it.
"""

from __future__ import annotations

import base64
import binascii
import hmac


def sign(secret: bytes, thinking: str, *, carry: bool = False) -> str:
    digest = hmac.digest(secret, thinking.encode(), "sha256")
    carried = thinking.encode() if carry else b""
    return base64.urlsafe_b64encode(digest + carried).decode()


def verified(secret: bytes, thinking: str, signature: str) -> str | None:
    """The reasoning that we signed; None if it is not ours, or was changed."""
    try:
        raw = base64.urlsafe_b64decode(signature.encode("ascii"))
        text = raw[32:].decode() or thinking
    except (binascii.Error, UnicodeError):
        return None
    if hmac.compare_digest(raw[:32], hmac.digest(secret, text.encode(), "sha256")):
        return text
    return None
