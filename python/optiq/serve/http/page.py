"""The page at /: one file, which may run its own script and ask this server, and nothing else."""

from __future__ import annotations

import base64
import re
from functools import cache
from hashlib import sha256
from importlib.resources import files

from starlette.responses import Response


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers that hold the browser to what stands in it."""
    text = (files("optiq.serve") / "page" / "index.html").read_text(encoding="utf-8")
    allowed = {
        "default-src": "'none'",
        "script-src": _hash_of("script", text),
        "style-src": _hash_of("style", text),
        "connect-src": "'self'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in allowed.items())
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return text.encode(), headers


def page() -> Response:
    body, headers = _page()
    return Response(body, media_type="text/html; charset=utf-8", headers=headers)


def _hash_of(tag: str, text: str) -> str:
    """The source expression that allows this very script or style."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found is not None
    digest = sha256(found[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
