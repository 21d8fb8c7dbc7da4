"""What every page has: the frame with its style, a chart for wide and narrow screens, facts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import unescape
from importlib.resources import files
from typing import Any

from .colors import stylesheet
from .curve import Curve
from .svg import chart
from .text import UNKNOWN, count, data, esc


def document(name: str, kicker: str, body: str) -> str:
    """A whole page about the model `name`; `body` goes on in the header and closes it."""
    headed, links = _anchored(body)
    nav = f'<nav aria-label="Sections">{" ".join(links)}</nav>\n' if len(links) > 1 else ""
    headed = headed.replace("</header>", f"{nav}</header>", 1)
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
{headed}
</main>
</body>
</html>
"""


def _anchored(body: str) -> tuple[str, list[str]]:
    """`body` with a link on every heading, and the links to them."""
    links: list[str] = []

    def anchor(match: re.Match[str]) -> str:
        title = match[1]
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        links.append(f'<a href="#{name}">{title}</a>')
        return f'<h2 id="{name}"><a href="#{name}">{title}</a></h2>'

    return re.sub(r"<h2>([^<]*)</h2>", anchor, body), links


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """A table of figures in HTML; `head` and the first cell of a row are headers.

    On a narrow screen each row is a list, whose terms are the words of `head`.
    """
    labels = [esc(" ".join(unescape(re.sub(r"<[^>]*>", " ", title)).split())) for title in head]
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    body = "".join(row(cells, labels) for cells in rows)
    return (
        f'<div class="scroll"><table class="figures {css}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def row(cells: Sequence[str], labels: Sequence[str]) -> str:
    first, *rest = cells
    said = zip(labels[1:], rest, strict=True)
    return (
        f'<tr><th scope="row">{first}</th>'
        + "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in said)
        + "</tr>"
    )


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
