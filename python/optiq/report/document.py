"""What every page has: the frame with its style, a chart for wide and narrow screens, facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from .colors import stylesheet
from .curve import Curve
from .svg import chart
from .text import UNKNOWN, count, data, esc


def document(name: str, kicker: str, body: str) -> str:
    """A whole page about the model `name`; `body` goes on in the header and closes it."""
    css = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="{esc(kicker)}">
<title>{esc(name)}: {esc(kicker)}</title>
<style>
{css}{stylesheet()}
</style>
</head>
<body>
<main>
<header>
<p class="kicker">{esc(kicker)}</p>
<h1><bdi>{esc(name)}</bdi></h1>
{body}
</main>
</body>
</html>
"""


def drawings(curve: Curve) -> str:
    """The chart twice, for wide and for narrow screens; the style shows one of them."""
    wide, narrow = chart(curve, 810, 440), chart(curve, 360, 340)
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A list of terms and what they are, in HTML."""
    body = "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in rows)
    return f'<dl class="facts">{body}</dl>'


def known(value: object) -> str:
    """A value as text, numbers exact; "not recorded" for None."""
    if value is None:
        return UNKNOWN
    return data(value, count(value)) if type(value) is int else esc(value)


def code(value: object) -> str:
    """An identifier, or "not recorded"."""
    return UNKNOWN if value is None else f"<code>{esc(value)}</code>"


def pairs(values: Mapping[str, Any] | None) -> str:
    """Key and value of a flat mapping, comma-separated; a nested value as JSON."""
    pairs = (
        f"{esc(key)} {known(v if isinstance(v, str | int | float | None) else json.dumps(v))}"
        for key, v in (values or {}).items()
    )
    return ", ".join(pairs) or UNKNOWN
