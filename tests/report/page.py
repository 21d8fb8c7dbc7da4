"""Reads a report back: a small element tree by html.parser that insists on balanced tags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}


@dataclass
class Element:
    tag: str
    attrs: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag: str = "", css: str = "") -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                if tag in ("", child.tag) and (not css or css in child.classes):
                    yield child
                yield from child.all(tag, css)

    def first(self, tag: str = "", css: str = "") -> Element:
        return next(self.all(tag, css))

    @property
    def classes(self) -> list[str]:
        return self.attrs.get("class", "").split()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.stack = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"repeated attribute in <{tag}>"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.stack[-1].children.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1].tag == tag, f"</{tag}> closes <{self.stack[-1].tag}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.stack[-1].children.append(data)


def read(html: str) -> Element:
    """The root of `html`; AssertionError when a tag is not closed in order."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert len(reader.stack) == 1, f"<{reader.stack[-1].tag}> is never closed"
    return reader.stack[0]


def rows(table: Element) -> dict[str, list[Element]]:
    """The cells of each body row by the text of its header."""
    return {tr.first("th").text: list(tr.all("td")) for tr in table.first("tbody").all("tr")}


def figures(cell: Element) -> list[float]:
    """The exact values of a cell's `<data>` elements."""
    return [float(data.attrs["value"]) for data in cell.all("data")]
